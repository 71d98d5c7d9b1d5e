"""Bugs planted in the cluster recursion, and the small cases that must show them.

python -m emulator.bugs_cluster [part of a name]        # what is reported for each
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from .bugs_gemm import DEADLOCK, RACE
from .planted import Bug, run

WRONG = r"is wrong: error"
ATT = ("att", "--tokens", "70", "--schedule", "trm")
MLP = ("mlp", "--tokens", "70", "--schedule", "trm")
TWO_PAIRS = ("att", "--hidden", "256", "--tokens", "70")
TWO_SAMPLES = ("att", "--tokens", "20", "--batch", "2", "--cluster", "4")
RING, PRODUCTS = "cluster_sm90a_ring.cuh", "cluster_sm90a_products.cuh"
ATTENTION, TOKEN_MIX = "cluster_sm90a_attention.cuh", "cluster_sm90a_token_mix.cuh"
KERNEL = "cluster_sm90a.cuh"


@dataclass(frozen=True)
class ClusterBug(Bug):
    """`kernel` is the case, as arguments of emulator.cluster_recursion joined by spaces.

    every_seed: whether each schedule shows the bug; else one of six must.
    """

    every_seed: bool = True

    @property
    def seeds(self) -> int:
        return 2 if self.every_seed else 6

    def missed(self, outcomes: list[str]) -> list[str]:
        """The outcomes that should have reported the bug and did not."""
        missed = [o for o in outcomes if not re.search(self.found, o)]
        return missed if self.every_seed or len(missed) == len(outcomes) else []

    def plant(self, folder: Path) -> None:
        super().plant(folder)
        keep_one_width(folder / "cluster_sm90a.cu", self.width)

    @property
    def copies_kernels(self) -> bool:
        return True

    @property
    def width(self) -> int:
        found = re.search(r"--hidden (\d+)", self.kernel)
        return int(found[1]) if found else 128

    def command(self) -> list[str]:
        module = "emulator.cluster_recursion"
        return [sys.executable, "-m", module, *self.kernel.split(), "--json"]


def keep_one_width(path: Path, width: int) -> None:
    """Compile one template instead of all: drop the other cases of the host's switch."""

    def keep(case: re.Match[str]) -> str:
        return case[0] if int(case[1]) == width else ""

    text, count = re.subn(r"    case (\d+):\s+return [^;]+;\n", keep, path.read_text())
    assert count >= 4, f"the switch over widths in {path.name} is not as expected"
    path.write_text(text)


def bug(
    name: str, case: tuple[str, ...], file: str, old: str, new: str, found: str, every: bool = True
) -> ClusterBug:
    return ClusterBug(name, " ".join(case), ((old, new),), found, file, every)


START = "  if (threadIdx.x == 0) init_barriers(at);\n  rx::cluster_arrive();\n  rx::cluster_wait();"
END = "  __syncwarp();\n  rx::cluster_arrive();\n  rx::cluster_wait();  // a CTA that left"
BUGS = [
    # ---- the tape
    bug("producer waits for the wrong parity", ATT, RING,
        "uint32_t parity = 1;  // waits", "uint32_t parity = 0;  // waits", DEADLOCK),
    bug("tape multicast to the sample's own CTAs only", TWO_SAMPLES, RING,
        "uint16_t((1u << at.cluster) - 1)", "uint16_t(3u << (at.rank() & ~1u))", DEADLOCK),
    bug("stage released while its products run", ATT, RING,
        "    rx::wgmma_wait<1>();\n    if (pending >= 0) release(pending);\n    pending = s;\n",
        "    release(s);\n", RACE),
    bug("stages released in the own CTA only", TWO_SAMPLES, RING,
        "rx::mapa(at.empty(stage), uint32_t(t))", "at.empty(stage)", RACE + "|more arrivals"),
    bug("skipped stage released before all warps saw it",
        ("att", "--hidden", "384", "--tokens", "97", "--inner", "256"), PRODUCTS,
        "        sync_warpgroup();  // all warps", "        // all warps", DEADLOCK, False),
    # ---- the cluster
    bug("no cluster barrier at the start", ATT, KERNEL, START,
        START.replace("rx::cluster_arrive();\n  rx::cluster_wait();", "__syncthreads();"),
        "before its initialisation is visible|not initialised"),
    bug("a CTA leaves while its peer needs it", ATT, KERNEL, END,
        "  // a CTA that left", "may exit before|has exited"),
    # ---- hand-overs between warpgroups, and the exchange between CTAs
    bug("no fence.proxy.async before a hand-over", ATT, PRODUCTS,
        "    rx::fence_proxy_async();\n    sync_warpgroup();\n    rx::bar_arrive",
        "    sync_warpgroup();\n    rx::bar_arrive", r"missing fence\.proxy\.async"),
    bug("no fence.proxy.async before K and V are sent", ATT, ATTENTION,
        "  rx::fence_proxy_async();\n  me.sync_warpgroup();\n", "  me.sync_warpgroup();\n",
        r"missing fence\.proxy\.async"),
    bug("the other warpgroup's half is not waited for", ATT, PRODUCTS,
        "    rx::bar_sync(kBarHandover + int(handovers % 2) * 2 + (w ^ 1), 256);\n", "",
        RACE + "|uninit"),
    bug("K and V stored while the peer may still read the last ones", TWO_PAIRS, ATTENTION,
        "  me.wait_exchange_free();\n", "", RACE),
    bug("attends before the peer's keys are there", ATT, ATTENTION,
        "    me.wait_exchanged();\n", "    me.exchanges++;\n", RACE + "|uninit"),
    bug("exchange freed in the own CTA only", TWO_PAIRS, PRODUCTS,
        "at.rank() ^ uint32_t(i)", "at.rank()", RACE + "|more arrivals"),
    bug("norm before both warpgroups' sums are there", ATT, PRODUCTS,
        "    sync_consumers();\n    float scale[2];", "    float scale[2];", RACE + "|uninit"),
    bug("token mix goes on before its rows are back", MLP, TOKEN_MIX,
        "    rx::mbar_wait(at.returned(), me.returns++ & 1);\n", "", RACE),
    bug("rows returned unannounced", MLP, PRODUCTS,
        "    rx::mbar_arrive_remote(rx::mapa(at.exchanged(w), at.peer()));\n",
        "    rx::mbar_arrive(at.exchanged(w));\n", RACE),
    # ---- arithmetic
    bug("gate and up swapped", ATT, PRODUCTS,
        "silu(gate_up[i]) * gate_up[32 + i];", "silu(gate_up[32 + i]) * gate_up[i];", WRONG),
    bug("mask off by one", ("att", "--tokens", "3"), ATTENTION,
        "+ i >= me.p.r.tokens", "+ i > me.p.r.tokens", WRONG),
    bug("earlier keys not corrected for a higher maximum", ATT, ATTENTION,
        "part == 1 ? sum[e] : e ? correction.y : correction.x", "part == 1 ? sum[e] : 1.f", WRONG),
    bug("both CTAs rotate by the angles of the first 64 rows", ATT, ATTENTION,
        "min(int(me.at.half()) * kRows + me.row()", "min(me.row()", WRONG),
    bug("token norm over 128 tokens", MLP, TOKEN_MIX,
        "sum[e] / float(tokens)", "sum[e] / 128.f", WRONG),
    bug("last call's state is not written", ATT, KERNEL,
        "    if (!resident) now.written", "    if (resident) now.written", WRONG),
]  # fmt: skip


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    for planted in BUGS:
        if wanted in planted.name:
            outcomes = run(planted, seeds=planted.seeds)
            missed = planted.missed(outcomes)
            verdict = f"MISSED {len(missed)}: {missed[0]}" if missed else outcomes[0]
            print(f"{planted.name}: {verdict[:400]}\n", flush=True)


if __name__ == "__main__":
    main()
