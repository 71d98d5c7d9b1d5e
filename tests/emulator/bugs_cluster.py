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
LAUNCH = "cluster_sm90a/launch.cu"

ONE = Shape((ATT,))
CALLS = Shape((ATT,), schedule="trm")
TWO_PAIRS = Shape((ATT,), hidden=256, tokens=70)
ROUNDS = Shape((ATT,), inner=512)
TWO_SAMPLES = Shape((ATT,), tokens=20, batch=2, cluster=4)
TOKENS = Shape((MLP,), schedule="trm")
TALL = Shape((ATT,), hidden=512, tokens=97)
NETS = Shape((ATT,), tokens=20, schedule="hrm")
PACKED = Shape((ATT,), tokens=42, batch=2)  # two samples in two CTAs
NOT_FULL = Shape((ATT,), tokens=15, batch=3)


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
    Bug("tape multicast to the sample's own CTA only", TWO_SAMPLES, RING,
        "uint16_t((0x55u & ((1u << cluster) - 1)) << at.half())",
        "uint16_t(BUG ? 1u << at.rank() : (0x55u & ((1u << cluster) - 1)) << at.half())", DEADLOCK),
    Bug("two CTAs fetch the same share", TWO_SAMPLES, RING,
        "mine = share * (at.rank() / 2);", "mine = share * (BUG ? 0 : at.rank() / 2);", UNSET),
    Bug("both CTAs take the first half of the tape", ONE, RING,
        "(part.whole ? 0 : at.half() * kHalfStage)",
        "(BUG || part.whole ? 0 : at.half() * kHalfStage)", WRONG),
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
        "      me.sync_warpgroup();  // no product",
        "      if (!BUG) me.sync_warpgroup();  // no product", DEADLOCK, False),
    # ---- the cluster
    Bug("no cluster barrier at the start", ONE, KERNEL, CLUSTER_BARRIER + "no copy",
        "  if (BUG) __syncthreads();\n  else rx::cluster_arrive(), rx::cluster_wait();  // no copy",
        "before its initialisation is visible|not initialised"),
    Bug("a CTA leaves while its peer needs it", ONE, KERNEL, CLUSTER_BARRIER + "a CTA",
        "  if (!BUG) rx::cluster_arrive(), rx::cluster_wait();  // a CTA",
        "may exit before|has exited"),
    # ---- h, K and V of both warpgroups, and the exchanges between CTAs
    Bug("no fence.proxy.async before h is sent", ONE, PRODUCTS,
        "exchange_h() {\n    rx::fence_proxy_async_shared();\n",
        "exchange_h() {\n    if (!BUG) rx::fence_proxy_async_shared();\n", UNFENCED),
    Bug("h sent before all of it is written", ONE, PRODUCTS,
        "    sync_warpgroup();\n    if (t() == 0) {\n      const uint32_t bytes",
        "    if (!BUG) sync_warpgroup();\n    if (t() == 0) {\n      const uint32_t bytes", UNSET),
    Bug("one-sided exchange: the peer's columns of h are not waited for", ONE, PRODUCTS,
        "    wait_exchanged();\n  }\n  // ---- Mixed",
        "    if (BUG) exchanges++;\n    else wait_exchanged();\n  }\n  // ---- Mixed", UNSET),
    Bug("h written while the peer may still get it", CALLS, KERNEL,
        "    me.meet();", "    if (!BUG) me.meet();", RACE, False),
    Bug("tokens mixed while the peer may still get h", Shape((MLP, MLP), tokens=20), TOKEN_MIX,
        "    me.meet();", "    if (!BUG) me.meet();", RACE, False),
    Bug("no fence.proxy.async before a hand-over", ONE, PRODUCTS,
        "wrote for wgmma\n    rx::fence_proxy_async_shared();\n",
        "wrote for wgmma\n    if (!BUG) rx::fence_proxy_async_shared();\n", UNFENCED),
    Bug("no fence.proxy.async before a tile is sent", ONE, PRODUCTS,
        "place) const {\n    rx::fence_proxy_async_shared();\n",
        "place) const {\n    if (!BUG) rx::fence_proxy_async_shared();\n", UNFENCED),
    Bug("no fence.proxy.async before channels are sent", TOKENS, TOKEN_MIX,
        "    rx::fence_proxy_async_shared();\n", "    if (!BUG) rx::fence_proxy_async_shared();\n",
        UNFENCED),
    Bug("the other warpgroup's K and V are not waited for", ONE, PRODUCTS,
        "    rx::bar_sync(kBarHandover + int(handovers % 2)",
        "    if (!BUG) rx::bar_sync(kBarHandover + int(handovers % 2)", UNSET),
    Bug("K and V given back before they are read", ONE, ATTENTION,
        "    attend(me, q, me.at.own(kMixed, me.w));\n    me.hand_over();",
        "    if (BUG) me.hand_over();\n    attend(me, q, me.at.own(kMixed, me.w));\n"
        "    if (!BUG) me.hand_over();", RACE, False),
    Bug("stale middle: each round in the same place", ROUNDS, PRODUCTS,
        "return round % 2;", "return BUG ? 0 : round % 2;", RACE),
    Bug("mixed heads where K and V are", CALLS, ATTENTION,
        "constexpr int kMixed = 1;", "const int kMixed = !BUG;", RACE),
    Bug("mixed heads sent before the peer has taken the last ones", TWO_PAIRS, ATTENTION,
        "if (pair > 0) me.wait_taken();", "if (!BUG && pair > 0) me.wait_taken();", RACE, False),
    Bug("mixed heads taken before O has read them", TWO_PAIRS, ATTENTION,
        "      me.wait_exchanged();\n      me.second",
        "      me.wait_exchanged();\n      if (BUG) me.take();\n      me.second",
        RACE + "|more arrivals", False),
    Bug("K stored for the other warpgroup's rows", ONE, ATTENTION,
        "exchange_tile(me.w), kv,", "exchange_tile(me.w ^ BUG), kv,", WRONG + "|" + RACE),
    Bug("products before the peer's tile is there", ONE, PRODUCTS,
        "    rx::mbar_wait_copies(exchanged(), exchanges / 2 & 1);\n",
        "    if (!BUG) rx::mbar_wait_copies(exchanged(), exchanges / 2 & 1);\n", UNSET),
    Bug("norm before the peer's sums are there", ONE, PRODUCTS,
        "    wait_exchanged();\n    float scale[2];",
        "    if (BUG) exchanges++;\n    else wait_exchanged();\n    float scale[2];", UNSET),
    Bug("token mix goes on before the peer's channels are there", TOKENS, TOKEN_MIX,
        "    me.wait_exchanged();\n",
        "    if (BUG) me.exchanges++;\n    else me.wait_exchanged();\n", RACE),
    Bug("sent unannounced", TOKENS, PRODUCTS,
        "rx::mbar_arrive_remote_reads(rx::mapa(exchanged(), at.peer()));",
        "rx::mbar_arrive_remote_reads(rx::mapa(exchanged(), at.rank() ^ !BUG));",
        RACE + "|more arrivals"),
    Bug("rows behind the last of 112 are stored", TALL, PRODUCTS,
        "P::kTokens == 128 || w == 0", "BUG || P::kTokens == 128 || w == 0", RACE),
    # ---- arithmetic
    Bug("gate and up swapped", ONE, PRODUCTS,
        "swiglu(gate_up[i], gate_up[32 + i]);",
        "swiglu(gate_up[BUG * 32 + i], gate_up[!BUG * 32 + i]);", WRONG),
    Bug("mask off by one", Shape((ATT,), tokens=3), ATTENTION,
        "+ i >= me.p.r.tokens", "+ i >= me.p.r.tokens + BUG", WRONG),
    Bug("a packed neighbour leaks through the mask", PACKED, ATTENTION,
        "alone = me.p.samples > 1;", "alone = !BUG && me.p.samples > 1;", WRONG),
    Bug("both samples of two CTAs look at the keys of the first", PACKED, ATTENTION,
        "const int tile = alone ? me.w : 0;", "const int tile = alone && !BUG ? me.w : 0;",
        WRONG + "|" + RACE),
    Bug("a sample that straddles tiles misses the keys of one", ONE, ATTENTION,
        "    correction = exponentials(me, s, ",
        "    for (int i = 0; BUG && part == 1 && i < 32; i++) s[i] = -INFINITY;\n"
        "    correction = exponentials(me, s, ", WRONG),
    Bug("angles count on from sample to sample", PACKED, ATTENTION,
        "min(token_of(me.p, ", "min(BUG ? me.w * kRows : token_of(me.p, ", WRONG),
    Bug("packed sample after sample, so that one straddles both tiles", PACKED, RING,
        "{ return row / kRows * (p.samples - 1); }\n"
        "RX_DEVICE int token_of(const Params& p, int row) {"
        " return row - sample_of(p, row) * kRows; }",
        "{\n  if (BUG) return row / p.r.tokens;\n  return row / kRows * (p.samples - 1);\n}\n"
        "RX_DEVICE int token_of(const Params& p, int row) {\n"
        "  return row - sample_of(p, row) * (BUG ? p.r.tokens : kRows);\n}",
        WRONG),
    Bug("rows of the second sample count to the first", PACKED, RING,
        "return row / kRows * (p.samples - 1);", "return row / kRows * (p.samples - 1) * !BUG;",
        WRONG + "|elements behind"),
    Bug("rows of a sample that is not there are stored", NOT_FULL, STATES,
        "      if (!exists) return;\n",
        "      if (!exists && !(BUG && token_of(p, row) < p.r.tokens)) return;\n",
        "elements behind an output were written"),
    Bug("earlier keys not corrected for a higher maximum", ONE, ATTENTION,
        "e ? correction.y : correction.x", "BUG ? 1.f : e ? correction.y : correction.x", WRONG),
    Bug("both warpgroups rotate by the angles of the first 64 rows", ONE, ATTENTION,
        "me.w * kRows) + me.row()", "me.w * !BUG * kRows) + me.row()", WRONG),
    Bug("norm over one CTA's columns", ONE, PRODUCTS,
        "+ sums_s[2 * kRows + row() + 8 * e];", "+ sums_s[(BUG ? 0 : 2 * kRows) + row() + 8 * e];",
        WRONG),
    Bug("Q not rotated", ONE, ATTENTION, "    rope_rotate(me, query);\n",
        "    if (!BUG) rope_rotate(me, query);\n", WRONG),
    Bug("token norm over 128 tokens", TOKENS, TOKEN_MIX,
        "(sum[e]) / float(tokens)", "(sum[e]) / float(BUG ? 128 : tokens)", WRONG),
    Bug("stale state: h taken for every first operand", NETS, KERNEL,
        "resident = p.r.calls[now.call].stays &&",
        "resident = (BUG || p.r.calls[now.call].stays) &&", WRONG),
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
