"""Delete every synchronisation instruction of a real kernel's PTX, one at a time, and look.

    python -m emulator.ptx.deletions                   # the table, and what no run finds
    python -m emulator.ptx.deletions sm90a "mbarrier"  # one kernel, kinds that contain "mbarrier"

A deletion that nothing finds is redundant, which EXPLAINED says with the reason, or a hole in
the emulator. Each mutant runs in a process of its own: it may crash or spin.
"""

from __future__ import annotations

import multiprocessing
import re
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from aot import toolchain

from .. import gemm_residual_rms as gemm
from ..build import EmulatorFault
from .run import PtxKernel, load_ptx

TIMEOUT = 120  # seconds; a mutant that spins is found by max_switches long before
KINDS = {
    "bar.sync": r"\b(bar|barrier)\.(cta\.)?sync\b",
    "bar.warp.sync": r"\bbar\.warp\.sync\b",
    "fence.proxy.async": r"\bfence\.proxy\.async\b",
    "fence.mbarrier_init": r"\bfence\.mbarrier_init\b",
    "cp.async commit": r"\bcp\.async\.commit_group\b",
    "cp.async wait": r"\bcp\.async\.wait_group\b",
    "wgmma.fence": r"\bwgmma\.fence\b",
    "wgmma commit": r"\bwgmma\.commit_group\b",
    "wgmma wait": r"\bwgmma\.wait_group\b",
    "cluster barrier": r"\bbarrier\.cluster\.wait\b",
    "mbarrier.init": r"\bmbarrier\.init\b",
    "mbarrier arrive": r"\bmbarrier\.arrive\b",
    "mbarrier wait": r"\bmbarrier\.try_wait\b",
}


@dataclass(frozen=True)
class Subject:
    """A kernel whose PTX is mutated: texts[0] is, the others only accompany it."""

    name: str
    texts: tuple[str, ...]
    load: Callable[[tuple[str, ...]], Any]
    run: Callable[[Any, dict], str]  # 'right', or what was found
    # (kind, which of its kind, from 0) -> why deleting it changes nothing
    explained: dict[tuple[str, int], str]


@dataclass(frozen=True)
class Deletion:
    kind: str
    index: int  # which of its kind
    line: int  # in the PTX, from 0
    text: str


@dataclass(frozen=True)
class Finding:
    deletion: Deletion
    in_order: str
    random: str
    checked: str

    @property
    def found(self) -> bool:
        return self.checked != "right"


def deletions(ptx: str, kind: str = "") -> list[Deletion]:
    counts: Counter[str] = Counter()
    found = []
    for number, line in enumerate(ptx.splitlines()):
        for name, pattern in KINDS.items():
            if re.search(pattern, line):
                if kind in name:
                    found.append(Deletion(name, counts[name], number, line.strip()))
                counts[name] += 1
    return found


def without(ptx: str, deletion: Deletion) -> str:
    lines = ptx.splitlines()
    line = lines[deletion.line]
    if deletion.kind == "mbarrier wait":  # the loop around it must end
        lines[deletion.line] = re.sub(
            r"mbarrier\.try_wait\S*\s+([%\w]+)\s*,.*", r"setp.eq.u32 \1, 1, 1;", line
        )
    else:
        # Inline asm may hold several instructions in a line: drop this one and its predicate.
        pattern = rf"(@!?%?\w+\s+)?{KINDS[deletion.kind]}[^;]*;"
        lines[deletion.line] = re.sub(pattern, "", line, count=1)
    if deletion.kind == "cluster barrier":
        arrive = deletion.line
        while "barrier.cluster.arrive" not in lines[arrive]:
            arrive -= 1
        lines[arrive] = ""
    assert lines[deletion.line] != line, f"nothing deleted from {line}"
    return "\n".join(lines)


IN_ORDER = {"race": 0, "random_order": 0, "async": 0, "seed": 1}
RANDOM = [{"race": 0, "random_order": 1, "async": 2, "seed": seed} for seed in range(1, 6)]
CHECKED = {"race": 1, "random_order": 1, "async": 2, "seed": 1}


def outcome(subject: Subject, texts: tuple[str, ...], settings: list[dict]) -> str:
    """The first of these runs that is not right, in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def work() -> None:
        library = subject.load(texts)
        library.configure(max_switches=20_000_000)
        results = (subject.run(library, dict(s)) for s in settings)
        theirs.send(next((r for r in results if r != "right"), "right"))

    child = context.Process(target=work)
    child.start()
    theirs.close()
    try:
        if not ours.poll(TIMEOUT):
            return "timeout"
        return ours.recv()
    except EOFError:
        return "crash"
    finally:
        child.kill()
        child.join()


def examine(subject: Subject, deletion: Deletion, only_checked: bool = False) -> Finding:
    texts = (without(subject.texts[0], deletion), *subject.texts[1:])
    checked = outcome(subject, texts, [CHECKED])
    if only_checked:
        return Finding(deletion, "", "", checked)
    in_order, random = (outcome(subject, texts, runs) for runs in ([IN_ORDER], RANDOM))
    return Finding(deletion, in_order, random, checked)


# ---- the kernels --------------------------------------------------------------------------------
def nvcc_subject(kernel: str) -> Subject:
    arch, template, case = {
        "sm80": ("80", "ILi128ELi4E", gemm.Case(43, 128, 320)),
        "sm90a": ("90a", "ILi64ELi2E|pack_tape", gemm.Case(200, 128, 832, 2)),
    }[kernel]
    files = gemm.kernels(kernel)
    built = [toolchain.nvcc_compile(file, arch, to="ptx").cubin for file in files]
    texts = [path.read_text() for path in built]
    texts[0] = _one_entry(texts[0], template.split("|")[0])
    return Subject(
        name=kernel,
        texts=tuple(texts),
        load=lambda texts: load_ptx(texts, [*files, "runtime.cu"], wanted=template),
        run=lambda library, settings: gemm.outcome(library, case, kernel, **settings),
        explained=EXPLAINED.get(kernel, {}),
    )


def _one_entry(ptx: str, template: str) -> str:
    """Cut the other templates away, so that what is deleted is what runs."""
    head, *entries = re.split(r"(?=^\s*\.visible \.entry )", ptx, flags=re.M)
    return head + next(entry for entry in entries if template in entry.split("(")[0])


def triton_subject(arch: str) -> Subject:
    """The smallest linear_residual_rms whose pipeline fills and drains."""
    from recurx.kernels.linear import linear_residual_rms

    from .triton_launch import captured

    shapes = ((70, 256), (64, 256), (70, 64))
    generator = torch.Generator().manual_seed(0)
    a, w, residual = (torch.randn(*s, generator=generator).bfloat16() for s in shapes)
    out = torch.empty_like(residual)
    (launch,) = captured(arch, lambda: linear_residual_rms(a, w, residual, out=out))
    x = residual.double() + a.double() @ w.double().T
    want = x * torch.rsqrt((x * x).mean(1, keepdim=True) + 1e-5)

    def run(kernel: PtxKernel, settings: dict) -> str:
        kernel.configure(**settings)
        out.fill_(float("nan"))
        try:
            launch.run(kernel)
        except EmulatorFault as fault:
            return str(fault)
        right = (out.double() - want).abs() <= 2**-8 * want.abs() + 1e-3
        return "right" if right.all() else f"{int((~right).sum())} elements are wrong"

    return Subject(
        name=f"triton{arch}",
        texts=(launch.made.ptx,),
        load=lambda texts: PtxKernel(texts[0]),
        run=run,
        explained=EXPLAINED.get(f"triton{arch}", {}),
    )


_JOINED = "its copies join the next group, and both groups are waited for together"
_REPEATED = "the same wait stands in front of it, with no new copy between them"
# The Triton rows hold for the PTX of Triton 3.9; another version numbers its instructions anew.
EXPLAINED: dict[str, dict[tuple[str, int], str]] = {
    "sm90a": {
        ("bar.warp.sync", 1): "brings a warp together for the .aligned cluster barrier behind it; "
        "no memory order hangs on it, and convergence is not emulated",
    },
    "triton80": {
        ("cp.async commit", 0): _JOINED,
        ("cp.async wait", 1): _REPEATED,
        ("cp.async wait", 2): _REPEATED,
        ("cp.async wait", 3): _REPEATED,
        ("bar.sync", 1): "the barrier before it has already ordered all that is read behind it",
    },
    "triton90": {
        ("cp.async commit", 0): _JOINED,
        ("bar.sync", 1): "there is one warpgroup: a thread that has waited for a wgmma group knows "
        "that the whole product is done, so the stage may be refilled (CUTLASS relies on it too)",
    },
}
SUBJECTS = {
    "sm80": lambda: nvcc_subject("sm80"),
    "sm90a": lambda: nvcc_subject("sm90a"),
    "triton80": lambda: triton_subject("80"),
    "triton90": lambda: triton_subject("90"),
}


def main(name: str = "", kind: str = "") -> int:
    unexplained = 0
    for subject_name, make in SUBJECTS.items():
        if name not in ("", subject_name):
            continue
        subject = make()
        assert outcome(subject, subject.texts, [IN_ORDER, CHECKED]) == "right"
        todo = deletions(subject.texts[0], kind)
        with ThreadPoolExecutor(2) as pool:
            findings = list(pool.map(lambda d, s=subject: examine(s, d), todo))
        print(table(subject, findings), flush=True)
        for finding in findings:
            if not finding.found:
                key = (finding.deletion.kind, finding.deletion.index)
                reason = subject.explained.get(key)
                unexplained += reason is None
                where = f"PTX line {finding.deletion.line + 1}: {finding.deletion.text[:70]}"
                print(f"  not found: {key}, {where}\n    {reason or 'NOT EXPLAINED'}")
    return unexplained


def table(subject: Subject, findings: list[Finding]) -> str:
    head = f"{subject.name:12s} {'kind':22s} {'deleted':>8s} {'in order':>9s} {'random x5':>10s}"
    rows = [head + f" {'checker x1':>11s}"]
    for kind in KINDS:
        of_kind = [f for f in findings if f.deletion.kind == kind]
        if of_kind:
            found = [
                sum(getattr(f, run) != "right" for f in of_kind)
                for run in ("in_order", "random", "checked")
            ]
            row = f"{'':12s} {kind:22s} {len(of_kind):8d} {found[0]:9d} {found[1]:10d}"
            rows.append(f"{row} {found[2]:11d}")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(bool(main(*sys.argv[1:3])))
