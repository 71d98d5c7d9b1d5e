"""Milliseconds per supervision step on the CPU: recurx against eager and compiled PyTorch.

    python -m bench.cpu_step --case trm-att trm-mlp hrm --batch 1 8 64

One process a variant; every round times each variant once, in turn, so that slow minutes of the
machine hit all alike; medians and their ratios are reported. Correctness comes first: a variant
whose step is further from the fp32 step than eager PyTorch of its dtype (x 1.25, and 1 % of slack
for fp32's own summation order) gets no time. Includes embedding and heads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.cpu_cases import CASES, VARIANTS
from bench.provenance import ROOT, provenance

BASELINE = {"bfloat16": "eager", "float32": "eager-fp32"}


class Remote:
    """A worker process for one variant."""

    def __init__(self, case: str, variant: str, batch: int, threads: int, folder: str) -> None:
        self.variant = variant
        self.output = str(Path(folder) / f"{variant}.pt")
        arguments = dict(case=case, variant=variant, batch=batch, threads=threads)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.cpu_cases", json.dumps(arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        )  # fmt: skip

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.variant}: worker ended, exit {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def drift(folder: str, variant: str) -> float:
    """Relative distance of a variant's logits and states from those of eager fp32."""
    got, exact = (torch.load(Path(folder) / f"{v}.pt") for v in (variant, "eager-fp32"))
    return max(float((got[n] - exact[n]).norm() / exact[n].norm()) for n in exact)


def measure(
    case: str, batch: int, variants: list[str], threads: int, seconds: float, console: Console
) -> dict[str, Any]:
    """One case at one batch size: correctness, then interleaved rounds for about `seconds`."""
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        remotes = []
        for variant in variants:
            console.print(f"[dim]{case} B={batch}: starting {variant}[/dim]")
            remote = Remote(case, variant, batch, threads, folder)
            started = remote.ask("start", output=remote.output)
            rows[variant] = {**started, "times": []}
            remotes.append(remote)
        for remote in list(remotes):
            row, dtype = rows[remote.variant], VARIANTS[remote.variant][0]
            row["drift"] = drift(folder, remote.variant)
            allowed = 1.25 * drift(folder, BASELINE[dtype]) + (0.01 if dtype == "float32" else 0)
            row["correct"] = row["drift"] <= allowed
            if not row["correct"]:
                console.print(f"[red]{remote.variant}: drift {row['drift']:.3g} > {allowed:.3g}")
                remotes.remove(remote)
                remote.close()
        # A slow variant (bf16 without hardware for it) takes part in fewer rounds: one in `skip`.
        warm = {remote.variant: remote.ask("time")["seconds"] for remote in remotes}
        fastest = min(warm.values())
        skip = {name: max(1, round(value / (20 * fastest))) for name, value in warm.items()}
        per_round = sum(value / skip[name] for name, value in warm.items())
        rounds = max(3, min(200, round(seconds / per_round)))
        for index in range(rounds):
            for remote in remotes:
                if index % skip[remote.variant] == 0:
                    rows[remote.variant]["times"].append(remote.ask("time")["seconds"])
        for remote in remotes:
            remote.close()
    return {"case": case, "batch": batch, "rows": {v: summary(r) for v, r in rows.items()}}


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """p20, p50 and p80 in milliseconds in place of the list of times."""
    times = sorted(1e3 * t for t in row.pop("times"))
    if times:
        at = lambda q: times[min(len(times) - 1, int(q * len(times)))]  # noqa: E731
        row |= {"p20_ms": at(0.2), "p50_ms": statistics.median(times), "p80_ms": at(0.8)}
        row["rounds"] = len(times)
    return row


def show(result: dict[str, Any], console: Console) -> None:
    """The table of one case: ratios to recurx of the same dtype, > 1 where recurx is faster."""
    table = Table(title=f"{result['case']}, B={result['batch']}: ms per supervision step")
    for head in ("variant", "p20", "p50", "p80", "recurx is faster by", "drift", "first step MiB"):
        table.add_column(head, justify="left" if head == "variant" else "right")
    rows = result["rows"]
    for variant, row in rows.items():
        if "p50_ms" not in row:
            table.add_row(variant, *["wrong"] * 3, "", f"{row['drift']:.2g}", "")
            continue
        ours = rows.get("recurx-fp32" if variant.endswith("fp32") else "recurx", {})
        ratio = f"{row['p50_ms'] / ours['p50_ms']:.2f}x" if "p50_ms" in ours else ""
        table.add_row(
            variant, *(f"{row[k]:.1f}" for k in ("p20_ms", "p50_ms", "p80_ms")), ratio,
            f"{row['drift']:.2g}", f"{row['first_peak_mib']:.0f}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--variant", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=60.0, help="timed, a case and batch")
    parser.add_argument("--out", type=Path, help="JSON file; default bench/results/cpu-DATE.json")
    options = parser.parse_args()
    baselines = [BASELINE[VARIANTS[variant][0]] for variant in options.variant]
    variants = list(dict.fromkeys([*options.variant, *baselines, "eager-fp32"]))
    console = Console(width=110)
    facts = provenance()
    out = options.out or ROOT / "bench" / "results" / f"cpu-{facts['date'][:16]}.json"
    results: list[dict[str, Any]] = []
    for case in options.case:
        for batch in options.batch:
            results.append(
                measure(case, batch, variants, options.threads, options.seconds, console)
            )
            show(results[-1], console)
            text = json.dumps(
                {"provenance": facts, "threads": options.threads, "results": results}, indent=1
            )
            out.parent.mkdir(parents=True, exist_ok=True)
            partial = out.with_suffix(".partial")
            partial.write_text(text + "\n")
            partial.replace(out)
    console.print(f"written to {out}")


if __name__ == "__main__":
    main()
