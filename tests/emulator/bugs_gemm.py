"""Bugs planted in the GEMM + residual + rms kernels."""

from __future__ import annotations

from .planted import SM80, SM90A, Bug

RACE = r"^.*race: (read|write) after (read|write)"
WRONG = r"elements are wrong"
DEADLOCK = r"deadlock: \d+ threads wait"

LOOP_BARRIER = "    __syncthreads();  // tile kt is there for all, and all have left tile kt - 1\n"
SUM_BARRIER = "  __syncthreads();\n#pragma unroll\n  for (int i = 0; i < 2; i++)\n"
CLUSTER_START = "  rx::cluster_arrive();\n  rx::cluster_wait();  // no copy"
CLUSTER_END = "  rx::cluster_arrive();\n  rx::cluster_wait();  // a CTA"
RELEASE = "kt > 0 && t < P::kCluster && at.shares_with(t)"

BUGS = [
    # ---- sm_80: cp.async ring, ldmatrix, mma.sync
    Bug(
        "wait leaves one group too many in flight",
        SM80,
        (("cp_async_wait<kStages - 2>", "cp_async_wait<kStages - 1>"),),
        RACE + ".*cp.async",
    ),
    Bug("no barrier in the loop", SM80, ((LOOP_BARRIER, ""),), RACE + "|uninitialised"),
    Bug(
        "no barrier before the sum over warps",
        SM80,
        ((SUM_BARRIER, SUM_BARRIER.removeprefix("  __syncthreads();\n")),),
        RACE + "|uninitialised",
    ),
    Bug(
        "copy into a stage that is still read",
        SM80,
        (("load_stage<P, N>(p, stage(next),", "load_stage<P, N>(p, stage(next - 1),"),),
        RACE,
    ),
    Bug(
        "no commit in the loop",
        SM80,
        (("    rx::cp_async_commit();\n    multiply_stage", "    multiply_stage"),),
        RACE,
    ),
    Bug(
        "sums share memory with a stage",
        SM80,
        (("(smem + P::kSums)", "(smem + P::kStage)"),),
        RACE,
    ),
    Bug(
        "tiles of W exchanged",
        SM80,
        (("mma_m32n16k16(acc[0][j], acc[0][j + 1],", "mma_m32n16k16(acc[0][j + 1], acc[0][j],"),),
        WRONG,
    ),
    Bug(
        "wrong rows in the address of A",
        SM80,
        (("i * 16 + (lane & 15), ks * 2 + (lane >> 4)", "i * 16 + (lane & 15), ks * 2"),),
        WRONG,
    ),
    Bug(
        "sum over one warp too many",
        SM80,
        (("w < P::kWarps;", "w <= P::kWarps;"),),
        "read outside shared memory",
    ),
    Bug(
        "sum over two of four lanes",
        SM80,
        (("(rx::kFullWarp, s, 2)", "(rx::kFullWarp, s, 0)"),),
        WRONG,
    ),
    Bug(
        "rows beyond m are stored",
        SM80,
        (("      if (r >= p.m) continue;\n", ""),),
        "rows beyond m",
    ),
    Bug(
        "stage one row short",
        SM80,
        (("i < N * 4; i += P::kThreads", "i < N * 4 - 4; i += P::kThreads"),),
        "uninitialised",
    ),
    # ---- sm_90a: multicast, mbarrier ring, wgmma, distributed shared memory
    Bug(
        "producer waits for the wrong parity",
        SM90A,
        (("at.parity(kt) ^ 1", "at.parity(kt)"),),
        DEADLOCK,
    ),
    Bug(
        "half the bytes are expected",
        SM90A,
        (("at.full(kt), P::kStage)", "at.full(kt), P::kStage / 2)"),),
        ".",
    ),
    Bug(
        "multicast reaches only the sender",
        SM90A,
        (("3u << (2 * at.row_group)", "1u << at.rank"),),
        DEADLOCK,
    ),
    Bug(
        "producer does not wait for empty stages",
        SM90A,
        (("    rx::mbar_wait(at.empty(kt), at.parity(kt) ^ 1);", "   "),),
        RACE + "|more arrivals in a phase",
    ),
    Bug(
        "stage released while wgmma reads it",
        SM90A,
        (("    rx::wgmma_wait<1>();\n", ""), (RELEASE, RELEASE)),
        RACE + ".*wgmma",
    ),
    Bug(
        "stage released one tile early",
        SM90A,
        (("at.empty(kt - 1), t)", "at.empty(kt), t)"), ("kt > 0 && t", "t")),
        RACE + ".*wgmma",
    ),
    Bug(
        "only the own CTA is told that a stage is free",
        SM90A,
        ((RELEASE, "kt > 0 && t == at.rank"), ("P::kReceivers * P::kConsumers", "P::kConsumers")),
        RACE,
    ),
    Bug(
        "empty barriers count too few",
        SM90A,
        (("P::kReceivers * P::kConsumers", "P::kConsumers"),),
        ".",
    ),
    Bug(
        "consumer does not wait for the tile",
        SM90A,
        (("    rx::mbar_wait(at.full(kt), at.parity(kt));\n", ""),),
        RACE + "|uninit",
    ),
    Bug(
        "W share lands at the wrong rows",
        SM90A,
        (("at.tile_w(kt) + first_row * 128", "at.tile_w(kt)"),),
        RACE + "|uninit",
    ),
    Bug("wrong k step in A", SM90A, (("rows_a + ks * 32", "rows_a + ks * 16"),), WRONG),
    Bug("no wait for the last products", SM90A, (("  rx::wgmma_wait<0>();\n", ""),), "wrong|race"),
    Bug("no wgmma.fence", SM90A, (("    rx::wgmma_fence();\n", ""),), "without wgmma.fence"),
    Bug(
        "wrong stride of row groups",
        SM90A,
        (("group_stride = 1024", "group_stride = 512"),),
        WRONG,
        "rx/wgmma.cuh",
    ),
    Bug(
        "more registers than the file has",
        SM90A,
        (("dec<40>", "dec<56>"), ("inc<232>", "inc<240>")),
        r"deadlock(.*\n)*.*setmaxnreg 240",
    ),
    Bug(
        "barriers not made visible to the cluster",
        SM90A,
        ((CLUSTER_START, "  __syncthreads();  // no copy"),),
        "before its initialisation is visible|not initialised",
    ),
    Bug(
        "no fence.mbarrier_init",
        SM90A,
        (("  rx::fence_mbarrier_init();\n", ""),),
        "no fence.mbarrier_init",
    ),
    Bug("a CTA leaves early", SM90A, ((CLUSTER_END, "  // a CTA"),), "may exit before|has exited"),
    Bug(
        "lane 0 speaks for its warp unasked",
        SM90A,
        (("  __syncwarp();  // lane 0", "  // lane 0"),),
        RACE,
    ),
    Bug(
        "no wait for the other half's sums",
        SM90A,
        (("  rx::mbar_wait(ready, 0);\n", ""),),
        RACE + "|uninit",
    ),
    Bug(
        "sums announced to the wrong CTA",
        SM90A,
        (("rx::mapa(ready, at.rank ^ 1)", "rx::mapa(ready, at.rank)"),),
        RACE + "|uninit|may exit",
    ),
    Bug(
        "sums stored in the own CTA",
        SM90A,
        (
            (
                "rx::mapa(at.smem_s + P::kSums, at.rank ^ 1)",
                "rx::mapa(at.smem_s + P::kSums, at.rank)",
            ),
        ),
        RACE + "|wrong",
    ),
    Bug(
        "rows beyond m are stored, sm_90a",
        SM90A,
        (("    if (r >= p.m) continue;\n", ""),),
        "rows beyond m",
    ),
]
