"""Bugs that a reader of the kernels planted without having read the race checker.

BUGS must be found. CONTROLS change the code and are proven harmless: nothing may be reported.
`not_yet` marks what the emulator gets wrong, with the reason why the bug is one, or is none.
"""

from __future__ import annotations

from . import bugs_by_reader_sm90a as sm90a
from .planted import SM80
from .planted_by_reader import ReaderBug

PROLOGUE = "kt < kStages - 1; kt++"
WAIT = "    rx::cp_async_wait<kStages - 2>();\n"
BARRIER = "    __syncthreads();  // tile kt is there for all, and all have left tile kt - 1\n"
LOAD_NEXT = "    if (next < tiles) load_stage<P, N>(p, stage(next), row0, next);\n"
COMMIT = "    rx::cp_async_commit();\n"
SUM_BARRIER = "  __syncthreads();\n#pragma unroll\n"
SUMS = "reinterpret_cast<float*>(smem + P::kSums)"
SHUFFLE = "      s += __shfl_xor_sync(rx::kFullWarp, s, 1);\n"
CLEAR = "for (int e = 0; e < 4; e++) acc[i][j][e] = 0.f;"
SQUARES = "  float squares[2][2];\n  add_residual<P, N>"

ONE_CTA = (32, 128, 320, 1)  # so that no CTA before it has left values on the stacks

# ---- handover.cu
HANDOVER = "handover.cu"
STORED = "kBytes);\n      rx::bulk_commit();\n"
MAKER_FENCE = "    rx::fence_proxy_async();\n"
FILL = "    for (int i = threadIdx.x & 31; i < kWords; i += 32)\n"
END_HANDOVER = "  rx::cluster_arrive();\n  rx::cluster_wait();  // the source"

IN_SM80 = [
    ReaderBug("prologue one stage short", SM80, ((PROLOGUE, "kt < kStages - 2; kt++"),), "race"),
    ReaderBug(
        "no empty groups at the tail",
        SM80,
        ((LOAD_NEXT + COMMIT, LOAD_NEXT + "    if (next < tiles) rx::cp_async_commit();\n"),),
        "race",
    ),
    ReaderBug(
        "copies committed with the next group",
        SM80,
        ((LOAD_NEXT + COMMIT, COMMIT + LOAD_NEXT),),
        "race",
    ),
    ReaderBug("barrier before the wait", SM80, ((WAIT + BARRIER, BARRIER + WAIT),), "race"),
    ReaderBug(
        "next tile loaded in front of the barrier",
        SM80,
        (
            (BARRIER, ""),
            (LOAD_NEXT, LOAD_NEXT + BARRIER),
        ),
        "race",
    ),
    ReaderBug(
        "ring wraps one stage early", SM80, (("(kt % kStages)", "(kt % (kStages - 1))"),), "race"
    ),
    ReaderBug(
        "tail tiles beyond whole rounds skipped",
        SM80,
        (("p.k / P::kDepth;", "p.k / P::kDepth / kStages * kStages;"),),
        "wrong result",
    ),
    ReaderBug(
        "last valid row masked",
        SM80,
        (("inside = row0 + r < p.m;", "inside = row0 + r < p.m - 1;"),),
        "wrong result",
    ),
    ReaderBug(
        "row m stored too",
        SM80,
        (("if (r >= p.m) continue;", "if (r > p.m) continue;"),),
        "wrong result",
    ),
    ReaderBug(
        "row m of A read too",
        SM80,
        (("inside = row0 + r < p.m;", "inside = row0 + r <= p.m;"),),
        "illegal address",
        guarded=True,
    ),
    ReaderBug(
        "row m of the residual read too",
        SM80,
        (("if (r < p.m)\n", "if (r <= p.m)\n"),),
        "illegal address",
        guarded=True,
    ),
    ReaderBug(
        "swizzle on one side only",
        SM80,
        (("P::kTileA + tile_offset(r, c),", "P::kTileA + r * 64 + c * 16,"),),
        "wrong result",
    ),
    ReaderBug(
        "accumulators not cleared",
        SM80,
        ((CLEAR, ";"),),
        "wrong result",
        shape=ONE_CTA,
    ),
    ReaderBug(
        "half of the accumulators not cleared",
        SM80,
        ((CLEAR, CLEAR.replace("e < 4", "e < 2")),),
        "wrong result",
        shape=ONE_CTA,
    ),
    ReaderBug(
        "warp barrier where the CTA's is needed",
        SM80,
        ((SUM_BARRIER, SUM_BARRIER.replace("threads", "warp")),),
        "race",
    ),
    ReaderBug(
        "sums in stage 0, which the last tile uses",
        SM80,
        ((SUMS, "reinterpret_cast<float*>(smem)"),),
        "race",
        shape=(43, 128, 288, 1),
    ),
    ReaderBug(
        "shuffle by the lanes of valid rows only",
        SM80,
        (
            (
                SHUFFLE,
                "      if (int(blockIdx.x) * P::kRows + i * 16 + half * 8 + (lane >> 2) < p->m)\n"
                "        s += __shfl_xor_sync(rx::kFullWarp, s, 1);\n",
            ),
            ("reduce_rows(float", "reduce_rows(const Params* p, float"),
            ("reduce_rows<P>(squares", "reduce_rows<P>(&p, squares"),
        ),
        "deadlock",
        shape=(35, 128, 320, 1),
    ),
    ReaderBug(
        "last row block not launched",
        SM80,
        (("dim3(unsigned(p.m + P::kRows - 1) / P::kRows)", "dim3(unsigned(p.m) / P::kRows)"),),
        "wrong result",
        file="gemm_residual_rms_sm80.cu",
    ),
    ReaderBug(
        "shared memory asked for lacks the sums",
        SM80,
        (("kShared = kSums + kWarps * kRows * 4;", "kShared = kSums;"),),
        "misuse",
    ),
]

# ---- handover.cu: a ring of two buffers between two warps, bulk stores
IN_HANDOVER = [
    ReaderBug(
        "bulk stores never committed",
        HANDOVER,
        ((STORED, "kBytes);\n"),),
        "race",
    ),
    ReaderBug(
        "both buffers may still be read",
        HANDOVER,
        (("bulk_wait_read<1>", "bulk_wait_read<2>"),),
        "race",
    ),
    ReaderBug(
        "the buffer in flight is called empty, not the one before",
        HANDOVER,
        (("bar_arrive(3 + (b ^ 1), 64)", "bar_arrive(3 + b, 64)"),),
        "deadlock",
    ),
    ReaderBug(
        "one full barrier for both buffers",
        HANDOVER,
        (
            ("bar_arrive(1 + b, 64)", "bar_arrive(1, 64)"),
            ("bar_sync(1 + b, 64)", "bar_sync(1, 64)"),
        ),
        "race|deadlock",
    ),
    ReaderBug(
        "maker begins to wait one step late",
        HANDOVER,
        (("if (step >= 2)", "if (step >= 3)"),),
        "race|deadlock",
    ),
    ReaderBug(
        "stores not waited for at the end",
        HANDOVER,
        (("    rx::bulk_wait<0>();\n", ""),),
        "race|misuse",
    ),
    ReaderBug(
        "fence in front of the writes",
        HANDOVER,
        ((MAKER_FENCE, ""), (FILL, MAKER_FENCE + FILL)),
        "misuse",
    ),
    ReaderBug(
        "copy to the other CTA completes on the sender's barrier",
        HANDOVER,
        (("rx::mapa(bar_s, rank ^ 1)", "bar_s"),),
        "race",
    ),
    ReaderBug(
        "sender does not stay for its copy",
        HANDOVER,
        ((END_HANDOVER, "  // the source"),),
        "race",
    ),
]

HARMLESS = [
    # The source of a masked row is row 0 of A, which exists; rows do not mix, and none is stored.
    ReaderBug("masked rows not zeroed", SM80, (("inside ? 16 : 0", "16"),), "harmless"),
    # Ten tiles: stage 0 is read last for tile 8, before the barrier of tile 9, and no copy follows.
    ReaderBug(
        "sums in stage 0, which the last tile does not use",
        SM80,
        ((SUMS, "reinterpret_cast<float*>(smem)"),),
        "harmless",
    ),
    # Of exited threads neither __syncthreads (sm_70 on) nor a shuffle's mask asks anything, and the
    # lanes of a row, which alone exchange values, leave together. Nobody reads their sums.
    ReaderBug(
        "threads without valid rows leave early",
        SM80,
        ((SQUARES, "  if (row0 + ((threadIdx.x & 31) >> 2) >= p.m) return;\n" + SQUARES),),
        "harmless",
        shape=(35, 128, 320, 1),
    ),
    # The end of a grid completes its stores; only the source must outlive the reading.
    ReaderBug(
        "last stores waited for as far as they read",
        HANDOVER,
        (("bulk_wait<0>", "bulk_wait_read<0>"),),
        "harmless",
    ),
]

BUGS = [*IN_SM80, *sm90a.BUGS, *IN_HANDOVER]
CONTROLS = [*HARMLESS, *sm90a.CONTROLS]
ALL = [*BUGS, *CONTROLS]
