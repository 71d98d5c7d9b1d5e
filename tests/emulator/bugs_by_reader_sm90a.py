"""The reader's bugs in the cluster kernel: multicast, mbarriers, wgmma, remote shared memory."""

from __future__ import annotations

from .planted import SM90A
from .planted_by_reader import ReaderBug

EXPECT = "    rx::mbar_arrive_expect_tx(at.full(kt), P::kStage);\n"
SENT = "                            kShareW * 128, at.full(kt), to_half);\n"
WAIT_FULL = "    rx::mbar_wait(at.full(kt), at.parity(kt));\n"
INIT = "  if (threadIdx.x == 0) init_barriers(at);\n"
INIT_FENCE = "  rx::fence_mbarrier_init();\n"
START_ARRIVE = INIT + "  rx::cluster_arrive();\n"
START_WAIT = (
    "  rx::cluster_wait();  // no copy and no arrival before every CTA's barriers are there\n"
)
END = "  __syncwarp();\n  rx::cluster_arrive();\n  rx::cluster_wait();  // a CTA"
WAIT_READY = "  rx::mbar_wait(ready, 0);\n"
ROLES = "  if (threadIdx.x < 128) {\n    rx::setmaxnreg_dec<40>();\n"
PRODUCE = "    if (threadIdx.x == 0) produce(at, &a_map, p);\n"
SUMS_ROOM = "kFull = kSums + kRows * 4,"
ANNOUNCE = "  if (lane == 0) rx::mbar_arrive_remote(rx::mapa(ready, at.rank ^ 1));\n"
SUMS_SHARE = "    sum += __shfl_xor_sync(rx::kFullWarp, sum, 2);\n"
COMMIT = "    rx::wgmma_commit();\n"

BUGS = [
    ReaderBug(
        "box twice as tall as the share",
        SM90A,
        (("P::kRows / 2)", "P::kRows)"),),
        "race",
        file="gemm_residual_rms_sm90a.cu",
    ),
    ReaderBug(
        "lane 0 alone waits for the other half's sums",
        SM90A,
        ((WAIT_READY, "  if (lane == 0) rx::mbar_wait(ready, 0);\n"),),
        "race",
    ),
    ReaderBug(
        "producer keeps eight registers too many",
        SM90A,
        (("dec<40>", "dec<48>"),),
        "misuse|deadlock",
    ),
    ReaderBug(
        "parity right for two rounds only",
        SM90A,
        (("uint32_t(kt / P::kStages) & 1", "uint32_t(kt >= P::kStages)"),),
        "race|deadlock",
    ),
    ReaderBug(
        "arrive first, expect the bytes later",
        SM90A,
        (
            (EXPECT, "    rx::mbar_arrive(at.full(kt));\n"),
            (SENT, SENT + "    rx::mbar_expect_tx(at.full(kt), P::kStage);\n"),
        ),
        "race",
    ),
    ReaderBug(
        "one warp of the other half not counted",
        SM90A,
        (("P::kSumsReady, P::kConsumers * 4)", "P::kSumsReady, P::kConsumers * 4 - 1)"),),
        "race",
    ),
    ReaderBug(
        "one warpgroup speaks for both",
        SM90A,
        (
            ("P::kReceivers * P::kConsumers", "P::kReceivers"),
            ("kt > 0 && t <", "kt > 0 && threadIdx.x < 256 && t <"),
        ),
        "race",
    ),
    ReaderBug(
        "release without mapa",
        SM90A,
        (("rx::mapa(at.empty(kt - 1), t)", "at.empty(kt - 1)"),),
        "race",
    ),
    ReaderBug("first tile never released", SM90A, (("kt > 0 &&", "kt > 1 &&"),), "deadlock"),
    ReaderBug(
        "cluster arrive in front of the initialisation",
        SM90A,
        ((START_ARRIVE, "  rx::cluster_arrive();\n" + INIT),),
        "race",
    ),
    ReaderBug(
        "arrive for the end before the work",
        SM90A,
        (
            (ROLES, "  rx::cluster_arrive();\n" + ROLES),
            (END, "  __syncwarp();\n  rx::cluster_wait();  // a CTA"),
        ),
        "race",
    ),
    ReaderBug(
        "fence.mbarrier_init behind the cluster barrier",
        SM90A,
        ((INIT_FENCE, ""), (START_WAIT, START_WAIT + INIT_FENCE)),
        "misuse",
    ),
    ReaderBug(
        "B descriptor 16 bytes off",
        SM90A,
        (("at.tile_w(kt) + ks * 32)", "at.tile_w(kt) + 16 + ks * 32)"),),
        "race",
    ),
    ReaderBug(
        "accumulators restart at every tile",
        SM90A,
        (("(kt | ks) != 0", "ks != 0"),),
        "wrong result",
    ),
    ReaderBug(
        "accumulators start from zero at each k step of tile 0",
        SM90A,
        (("(kt | ks) != 0", "kt != 0"),),
        "wrong result",
    ),
    ReaderBug(
        "accumulators never start",
        SM90A,
        (("(kt | ks) != 0", "1"),),
        "wrong result",
    ),
    ReaderBug(
        "accumulators scaled while products run",
        SM90A,
        ((COMMIT, COMMIT + "    for (float& x : acc) x *= 0.5f;\n"),),
        "wrong result|misuse",
    ),
    ReaderBug("no wgmma.commit", SM90A, (("    rx::wgmma_commit();\n", ""),), "race"),
    # wgmma brings the threads of a warp together, not the warps: 1 to 3 may start too early.
    ReaderBug(
        "only warp 0 of a warpgroup waits for the tile",
        SM90A,
        ((WAIT_FULL, "    if (t < 32) rx::mbar_wait(at.full(kt), at.parity(kt));\n"),),
        "race",
    ),
    ReaderBug(
        "partner is the next CTA, not the other half",
        SM90A,
        (
            ("P::kSums, at.rank ^ 1)", "P::kSums, (at.rank + 1) % P::kCluster)"),
            ("rx::mapa(ready, at.rank ^ 1)", "rx::mapa(ready, (at.rank + 1) % P::kCluster)"),
        ),
        "wrong result",
    ),
    ReaderBug(
        "sums overlap the first full barrier",
        SM90A,
        ((SUMS_ROOM, "kFull = kSums + kRows * 4 - 8,"),),
        "misuse",
    ),
    ReaderBug(
        "sums announced before they are stored",
        SM90A,
        ((ANNOUNCE, ""), (SUMS_SHARE, SUMS_SHARE + "  if (h == 1)\n  " + ANNOUNCE)),
        "race",
    ),
    ReaderBug(
        "each warp of the producer elects a leader",
        SM90A,
        ((PRODUCE, PRODUCE.replace("threadIdx.x == 0", "threadIdx.x % 32 == 0")),),
        "misuse",
    ),
    # PTX: to initialise a valid mbarrier again is undefined.
    ReaderBug(
        "every lane of warp 0 initialises the barriers",
        SM90A,
        ((INIT, INIT.replace("threadIdx.x == 0", "threadIdx.x < 32")),),
        "race",
    ),
    ReaderBug(
        "setmaxnreg by one thread",
        SM90A,
        (
            (ROLES, "  if (threadIdx.x < 128) {\n"),
            (
                PRODUCE,
                "    if (threadIdx.x == 0) {\n      rx::setmaxnreg_dec<40>();\n"
                "      produce(at, &a_map, p);\n    }\n",
            ),
        ),
        "misuse|deadlock",
    ),
    ReaderBug(
        "producer keeps its registers",
        SM90A,
        ((ROLES, "  if (threadIdx.x < 128) {\n"),),
        "misuse|deadlock",
    ),
    ReaderBug(
        "odd last tile not multiplied",
        SM90A,
        (("multiply<P>(at, acc, p.k / P::kDepth)", "multiply<P>(at, acc, p.k / 128 * 2)"),),
        "race",
    ),
    ReaderBug(
        "both halves fetch the same columns of W",
        SM90A,
        (("at.half * P::kColumns + first_row;", "first_row;"),),
        "wrong result",
    ),
    ReaderBug(
        "both halves fetch the same rows of A",
        SM90A,
        (("at.row0 + int(at.half) * kShareA,", "at.row0,"),),
        "wrong result",
    ),
    ReaderBug(
        "warp diverged at an aligned cluster barrier",
        SM90A,
        ((END, END.removeprefix("  __syncwarp();\n")),),
        "misuse",
        not_yet="all lanes come to one call site, which is what is checked; PTX wants them there "
        "together, and nothing but __syncwarp promises that",
    ),
]


CONTROLS = [
    # The phase cannot end before the one arrival that it waits for, however many bytes have come.
    ReaderBug(
        "bytes expected after the copies, with the arrival",
        SM90A,
        ((EXPECT, ""), (SENT, SENT + EXPECT)),
        "harmless",
    ),
    # 24 + 2 * 232 = 488 registers for a thread of each warpgroup, and 3 * 168 = 504 are there.
    ReaderBug("producer keeps fewer registers", SM90A, (("dec<40>", "dec<24>"),), "harmless"),
    # What lane 0 has acquired it passes on: __syncwarp orders memory among its lanes.
    ReaderBug(
        "lane 0 waits for the other half's sums, then __syncwarp",
        SM90A,
        ((WAIT_READY, "  if (lane == 0) rx::mbar_wait(ready, 0);\n  __syncwarp();\n"),),
        "harmless",
    ),
    # barrier.cluster waits for threads that have not exited. The consumers keep the CTA alive, and
    # each waits for the bytes of every copy before it ends.
    ReaderBug(
        "producer warpgroup leaves early",
        SM90A,
        ((PRODUCE, PRODUCE + "    return;\n"),),
        "harmless",
    ),
    ReaderBug(
        "idle threads of the producer's warpgroup leave early",
        SM90A,
        ((PRODUCE, PRODUCE + "    if (threadIdx.x) return;\n"),),
        "harmless",
    ),
    # As above; and __syncwarp waits for the lanes of its mask that have not exited.
    ReaderBug(
        "producer thread leaves alone",
        SM90A,
        ((PRODUCE, PRODUCE + "    if (threadIdx.x == 0) return;\n"),),
        "harmless",
    ),
]
