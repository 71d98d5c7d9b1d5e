"""Bugs planted in the cluster recursion, all in one build, and the small case that shows each.

    python -m emulator.bugs_cluster [part of a name]        # what is reported for each

Each edit is an exact substitution whose new text holds BUG, which is true while that bug is awake;
so all of them cost one compilation.
"""

from __future__ import annotations

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from . import asleep
from .bugs_gemm import DEADLOCK, RACE
from .build import Emulated, build
from .cluster_recursion import ATT, FILES, MLP, Case, Shape, outcome

WRONG = r"is wrong: error"
UNSET = RACE + "|uninitialised"
UNFENCED = r"missing fence\.proxy\.async"
RING, PRODUCTS, ATTENTION, TOKEN_MIX, STATES, KERNEL = (
    f"cluster_sm90a/{part}.cuh"
    for part in ("ring", "product", "attention", "token_mlp", "states", "kernel")
)

ONE = Shape((ATT,))
CALLS = Shape((ATT,), schedule="trm")
TWO_PAIRS = Shape((ATT,), hidden=256, tokens=70)
ROUNDS = Shape((ATT,), inner=512)
TWO_SAMPLES = Shape((ATT,), tokens=20, batch=2, cluster=4)
TOKENS = Shape((MLP,), schedule="trm")
NETS = Shape((ATT,), tokens=20, schedule="hrm")


@dataclass(frozen=True)
class Bug:
    """every_seed: whether each of two schedules shows the bug; else one of six must."""

    name: str
    shape: Shape
    file: str
    old: str
    new: str
    found: str
    every_seed: bool = True

    def missed(self, library: Emulated, case: Case) -> list[str]:
        """The outcomes that should have reported the bug and did not."""
        seeds = range(1, 3 if self.every_seed else 7)
        outcomes = [outcome(library, case, seed=seed) for seed in seeds]
        missed = [o for o in outcomes if not re.search(self.found, o)]
        return missed if self.every_seed or len(missed) == len(outcomes) else []


CLUSTER_BARRIER = "  rx::cluster_arrive();\n  rx::cluster_wait();  // "
BUGS = [
    # ---- the tape
    Bug("producer waits for the wrong parity", ONE, RING,
        "uint32_t parity = 1;", "uint32_t parity = !BUG;", DEADLOCK),
    Bug("tape multicast to the sample's own CTAs only", TWO_SAMPLES, RING,
        "uint16_t((1u << at.cluster) - 1)",
        "uint16_t(BUG ? 3u << (at.rank() & ~1u) : (1u << at.cluster) - 1)", DEADLOCK),
    Bug("a CTA fetches its peer's share", TWO_SAMPLES, RING,
        "mine = share * at.rank();", "mine = share * (at.rank() & (BUG ? 2 : 3));", UNSET),
    Bug("stage released while its products run", ONE, RING,
        "    rx::wgmma_wait<1>();\n    if (pending >= 0) release(pending);\n    pending = s;\n",
        "    if (!BUG) rx::wgmma_wait<1>();\n    if (BUG) release(s);\n"
        "    else if (pending >= 0) release(pending);\n    pending = BUG ? -1 : s;\n", RACE),
    Bug("stages released in the own CTA only", TWO_SAMPLES, RING,
        "rx::mapa(at.empty(stage), uint32_t(t))",
        "(BUG ? at.empty(stage) : rx::mapa(at.empty(stage), uint32_t(t)))",
        RACE + "|more arrivals"),
    Bug("an idle warpgroup releases what not all of its warps saw",
        Shape((MLP,), tokens=20, token_inner=640), TOKEN_MIX,
        "if (!mine(0)) me.sync_warpgroup();", "if (!BUG && !mine(0)) me.sync_warpgroup();",
        DEADLOCK, False),
    # ---- the cluster
    Bug("no cluster barrier at the start", ONE, KERNEL, CLUSTER_BARRIER + "no copy",
        "  if (BUG) __syncthreads();\n  else rx::cluster_arrive(), rx::cluster_wait();  // no copy",
        "before its initialisation is visible|not initialised"),
    Bug("a CTA leaves while its peer needs it", ONE, KERNEL, CLUSTER_BARRIER + "a CTA",
        "  if (!BUG) rx::cluster_arrive(), rx::cluster_wait();  // a CTA",
        "may exit before|has exited"),
    # ---- h, hand-overs between warpgroups, and the exchange between CTAs
    Bug("no fence.proxy.async behind the input", ONE, STATES,
        "    rx::fence_proxy_async_shared();\n", "    if (!BUG) rx::fence_proxy_async_shared();\n",
        UNFENCED),
    Bug("no barrier behind the input", ONE, KERNEL,
        "    me.sync_consumers();\n#pragma unroll 1\n    for (now.block",
        "    if (!BUG) me.sync_consumers();\n#pragma unroll 1\n    for (now.block", UNSET),
    Bug("no fence.proxy.async before a hand-over", ONE, PRODUCTS,
        "    rx::fence_proxy_async_shared();\n    sync_warpgroup();\n    rx::bar_arrive",
        "    if (!BUG) rx::fence_proxy_async_shared();\n    sync_warpgroup();\n    rx::bar_arrive",
        UNFENCED),
    Bug("no fence.proxy.async before K and V are sent", ONE, ATTENTION,
        "  rx::fence_proxy_async_shared();\n  me.sync_warpgroup();\n",
        "  if (!BUG) rx::fence_proxy_async_shared();\n  me.sync_warpgroup();\n",
        UNFENCED),
    Bug("no fence.proxy.async before rows are returned", TOKENS, TOKEN_MIX,
        "    rx::fence_proxy_async_shared();\n", "    if (!BUG) rx::fence_proxy_async_shared();\n",
        UNFENCED),
    Bug("the other warpgroup's half is not waited for", ONE, PRODUCTS,
        "    rx::bar_sync(kBarHandover + int(handovers % 2)",
        "    if (!BUG) rx::bar_sync(kBarHandover + int(handovers % 2)", UNSET),
    Bug("the middle of each round in the same place", ROUNDS, PRODUCTS,
        "w + round % 2 * 2", "w + (BUG ? 0 : round % 2 * 2)", RACE),
    Bug("mixed heads where K is sent from", CALLS, ATTENTION,
        "return at.exchange_tile(w, at.half() ^ 1);",
        "return at.exchange_tile(w, at.half() ^ !BUG);", RACE),
    Bug("K and V stored while the peer may still read the last ones", TWO_PAIRS, ATTENTION,
        "  me.wait_exchange_free();\n", "  if (!BUG) me.wait_exchange_free();\n", RACE),
    Bug("K and V stored for the other CTA's rows", ONE, ATTENTION,
        "exchange_tile(me.w, at.half()),", "exchange_tile(me.w, at.half() ^ BUG),",
        RACE + "|uninit"),
    Bug("attends before the peer's keys are there", ONE, PRODUCTS,
        "    rx::mbar_wait_copies(at.exchanged(w), exchanges & 1);\n",
        "    if (!BUG) rx::mbar_wait_copies(at.exchanged(w), exchanges & 1);\n", UNSET),
    Bug("exchange freed in the own CTA only", TWO_PAIRS, PRODUCTS,
        "at.rank() ^ uint32_t(i)", "at.rank() ^ uint32_t(BUG ? 0 : i)", RACE + "|more arrivals"),
    Bug("exchange freed before O has read it", TWO_PAIRS, ATTENTION,
        "    if (pair > 0) {\n", "    if (BUG && pair > 0) me.free_exchange();\n"
        "    if (pair > 0) {\n", RACE + "|more arrivals"),
    Bug("norm before both warpgroups' sums are there", ONE, PRODUCTS,
        "    sync_consumers();\n    float scale[2];",
        "    if (!BUG) sync_consumers();\n    float scale[2];", UNSET),
    Bug("token mix goes on before its rows are back", TOKENS, TOKEN_MIX,
        "    rx::mbar_wait_copies(at.returned(), me.returns++ & 1);\n",
        "    if (!BUG) rx::mbar_wait_copies(at.returned(), me.returns++ & 1);\n", RACE),
    Bug("rows returned unannounced", TOKENS, PRODUCTS,
        "rx::mbar_arrive_remote_reads(rx::mapa(at.exchanged(w), at.peer()));",
        "rx::mbar_arrive_remote_reads(rx::mapa(at.exchanged(w), at.rank() ^ !BUG));", RACE),
    # ---- arithmetic
    Bug("gate and up swapped", ONE, PRODUCTS,
        "silu(gate_up[i]) * gate_up[32 + i];",
        "silu(gate_up[BUG * 32 + i]) * gate_up[!BUG * 32 + i];", WRONG),
    Bug("mask off by one", Shape((ATT,), tokens=3), ATTENTION,
        "+ i >= me.p.r.tokens", "+ i >= me.p.r.tokens + BUG", WRONG),
    Bug("earlier keys not corrected for a higher maximum", ONE, ATTENTION,
        "e ? correction.y : correction.x", "BUG ? 1.f : e ? correction.y : correction.x", WRONG),
    Bug("both CTAs rotate by the angles of the first 64 rows", ONE, ATTENTION,
        "min(int(me.at.half()) * kRows", "min(int(me.at.half()) * !BUG * kRows", WRONG),
    Bug("Q not rotated", ONE, ATTENTION, "    rope_rotate(me, query);\n",
        "    if (!BUG) rope_rotate(me, query);\n", WRONG),
    Bug("token norm over 128 tokens", TOKENS, TOKEN_MIX,
        "sum[e] / float(tokens)", "sum[e] / float(BUG ? 128 : tokens)", WRONG),
    Bug("stale state: h taken for every first operand", NETS, KERNEL,
        "resident = p.r.calls[now.call].stays;", "resident = BUG || p.r.calls[now.call].stays;",
        WRONG),
    Bug("states of this launch read as they came in", CALLS, STATES,
        "return 1u << state;", "return BUG ? 0 : 1u << state;", WRONG),
    Bug("the first net's tape for all", NETS, RING,
        "const int net = p.r.calls[c].net;", "const int net = BUG ? 0 : p.r.calls[c].net;", WRONG),
]  # fmt: skip


def plant_all(folder: Path) -> Emulated:
    """Builds a copy of the sources with every bug asleep."""
    asleep.plant(folder, BUGS, "cluster_sm90a")
    widths = sorted({bug.shape.hidden for bug in BUGS})
    listed = " ".join(f"X({width})" for width in widths)
    sources = [folder / name for name in FILES]
    return Emulated(build(sources, True, [f"-DRX_CLUSTER_WIDTHS(X)={listed}"]), True)


def wake(library: Emulated, bug: Bug | None) -> None:
    asleep.wake(library.library, BUGS, bug)


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    with tempfile.TemporaryDirectory() as folder:
        library = plant_all(Path(folder) / "sources")
        for bug in BUGS:
            if wanted not in bug.name:
                continue
            case = Case(bug.shape)
            wake(library, None)
            assert outcome(library, case, seed=1) == "right"
            wake(library, bug)
            missed, first = bug.missed(library, case), outcome(library, case, seed=1)
            print(f"{'MISSED ' if missed else ''}{bug.name}: {first[:300]}\n", flush=True)


if __name__ == "__main__":
    main()
