"""Bugs planted in the wrapper kernels: what the GEMM kernels have no use for."""

from __future__ import annotations

from .planted import Bug

FENCED = "  rx::fence_proxy_async();\n  __syncthreads();\n\n"  # before the first wgmma
WGMMA, GROUPS = "sm90a.cu wgmma_64", "sm80.cu cp_async_groups"
NAMED, STORE = "sm80.cu named_barrier", "sm90.cu bulk_store"
FLAG = "sm80.cu grid_barrier"
POLL = "rx::ld_acquire(arrived_g)"
RELEASE = "    rx::red_add_release(arrived_g, 1);\n"
# What has no wrapper, for no kernel needs it: the emulator's own calls.
RELEASED_TO_CTA = "emu::atomic_add(arrived_g, 1, emu::Order::kRelease, emu::Scope::kCta)"
ACQUIRED_FOR_CTA = "emu::atomic_load(arrived_g, emu::Order::kAcquire, emu::Scope::kCta)"
RELAXED = "emu::atomic_load(arrived_g, emu::Order::kRelaxed)"
WATCHED = "    }\n  }\n  __syncthreads();"
STALE = "stale L1: plain load of data written by another CTA"
DIVERGED = r"diverged warp: lane \d+ is at "
GLOBAL = r"race: (read after write|write after read) at global memory 'out_g'"

BUGS = [
    Bug(
        "younger group read too early",
        GROUPS,
        (("cp_async_wait<1>", "cp_async_wait<2>"),),
        "read after",
    ),
    Bug(
        "others' cp.async read without a barrier",
        "sm80.cu cp_async_16",
        (("  rx::cp_async_wait<0>();\n  __syncthreads();", "  rx::cp_async_wait<0>();"),),
        "read after write|uninit",
    ),
    Bug(
        "read before the named barrier", NAMED, (("    rx::bar_sync(1, 64);\n", ""),), "race|uninit"
    ),
    Bug(
        "nobody arrives at a named barrier",
        NAMED,
        (("    rx::bar_arrive(2, 64);\n", ""),),
        "deadlock.*\n.*barrier 2",
    ),
    Bug(
        "named barrier of the wrong size",
        NAMED,
        (("rx::bar_sync(1, 64)", "rx::bar_sync(1, 32)"),),
        "with counts|race|uninit|deadlock",
    ),
    Bug(
        "lanes read each other's stmatrix",
        "sm90.cu stmatrix_x4",
        (("r);\n  __syncwarp();", "r);"),),
        "read after write|uninit",
    ),
    Bug(
        "no proxy fence before a copy between CTAs",
        "sm90.cu bulk_to_cluster",
        (("    rx::fence_proxy_async();\n", ""),),
        "missing fence.proxy.async",
    ),
    Bug(
        "no proxy fence before a bulk store",
        STORE,
        (("  rx::fence_proxy_async();\n  __syncwarp();\n  if", "  __syncwarp();\n  if"),),
        "missing fence.proxy.async",
    ),
    Bug(
        "source of a bulk store overwritten",
        STORE,
        (("    rx::bulk_wait_read<1>();", "    "),),
        "write after read",
    ),
    Bug(
        "bulk load not waited for",
        "sm90.cu bulk_load",
        (
            (
                "  rx::mbar_wait(bar, 0);\n  for (int i = threadIdx.x; i < kWords",
                "  for (int i = threadIdx.x; i < kWords",
            ),
        ),
        "read after write|uninit",
    ),
    Bug(
        "one arrival too few",
        "sm90.cu mbarrier",
        (("rx::mbar_init(turn, 1)", "rx::mbar_init(turn, 2)"),),
        "deadlock.*\n.*mbarrier",
    ),
    Bug(
        "one arrival too many",
        "sm90.cu mbarrier",
        (("rx::mbar_init(both, 2)", "rx::mbar_init(both, 1)"),),
        "more arrivals|race|may exit|deadlock",
    ),
    Bug(
        "mail read before the cluster barrier",
        "sm90.cu dsmem",
        (
            ("m = mail4[t];", "m = mail4[t ^ 1];"),
            ("(rank, t, v.x, v.w));\n  cluster_sync();", "(rank, t, v.x, v.w));"),
        ),
        "read after write|uninit|may exit",
    ),
    Bug(
        "misaligned barrier",
        "sm90.cu tensor_load_2d",
        (("bar = data + 2 * kBoxWords * 4,", "bar = data + 2 * kBoxWords * 4 + 4,"),),
        "8-byte aligned",
    ),
    Bug(
        "no proxy fence before wgmma",
        WGMMA,
        ((FENCED, "  __syncthreads();\n\n"),),
        "missing fence.proxy.async",
    ),
    Bug(
        "no barrier before wgmma", WGMMA, ((FENCED, "  rx::fence_proxy_async();\n"),), "race|uninit"
    ),
    Bug(
        "proxy fence on the wrong side of the barrier",
        WGMMA,
        ((FENCED, "  __syncthreads();\n  rx::fence_proxy_async();\n"),),
        "missing fence.proxy.async",
    ),
    Bug(
        "odd register budget",
        "sm90a.cu wgmma_setmaxnreg",
        (("setmaxnreg_inc<200>", "setmaxnreg_inc<204>"),),
        "multiple of 8",
    ),
    Bug(
        "global scratch read without a barrier",
        "sm80.cu scratch",
        (("out_g[t] = t * 3;\n  __syncthreads();", "out_g[t] = t * 3;"),),
        GLOBAL,
    ),
    Bug(
        "flag raised before the data is written by all",
        "sm80.cu grid_barrier",
        (("b * 100 + t;\n  __syncthreads();", "b * 100 + t;"),),
        GLOBAL,
    ),
    Bug(
        "nobody waits for the thread that watches the flag",
        "sm80.cu grid_barrier",
        (("    }\n  }\n  __syncthreads();\n  out_g[(kGrid", "    }\n  }\n  out_g[(kGrid"),),
        GLOBAL,
    ),
    Bug(
        "no proxy fence before a bulk load of global scratch",
        "sm90.cu bulk_scratch",
        (("i] = 7 * i;\n  rx::fence_proxy_async_global();", "i] = 7 * i;"),),
        "missing fence.proxy.async after a generic write at global memory",
    ),
    # ---- scopes
    Bug(
        "flag released to the CTA alone",
        FLAG,
        ((RELEASE, RELEASE.replace("rx::red_add_release(arrived_g, 1)", RELEASED_TO_CTA)),),
        GLOBAL,
    ),
    Bug(
        "fence of the CTA before a relaxed flag",
        FLAG,
        ((RELEASE, "    __threadfence_block();\n    atomicAdd(arrived_g, 1u);\n"),),
        GLOBAL,
    ),
    Bug("flag acquired for the CTA alone", FLAG, ((POLL, ACQUIRED_FOR_CTA),), STALE),
    Bug("flag polled by relaxed loads", FLAG, ((POLL, RELAXED),), STALE),
    Bug(
        "fence of the CTA after a relaxed flag",
        FLAG,
        (
            (POLL, RELAXED),
            (WATCHED, WATCHED.replace("  }\n  __", "    __threadfence_block();\n  }\n  __")),
        ),
        STALE,
    ),
    Bug(
        "scratch read through the cache of constants",
        "sm80.cu scratch",
        (("= out_g[63 - t];", "= __ldg(out_g + 63 - t);"),),
        "ld.global.nc of memory that this launch has written",
    ),
    Bug(
        "data handed over by an arrival at CTA scope",
        "sm90.cu mbarrier",
        (("rx::mbar_arrive_remote(rx::mapa(turn", "rx::mbar_arrive_remote_reads(rx::mapa(turn"),),
        "race: read after write at cta",
    ),
    Bug(
        "data taken over by a wait at CTA scope",
        "sm90.cu mbarrier",
        (("if (rank || round) rx::mbar_wait(", "if (rank || round) rx::mbar_wait_copies("),),
        "race: read after write at cta",
    ),
    # ---- .aligned
    Bug(
        "half a warp at another bar.sync",
        NAMED,
        (
            (
                "    rx::bar_sync(2, 64);",
                "    if (lane < 16) rx::bar_sync(2, 64);\n    else rx::bar_sync(2, 64);",
            ),
        ),
        DIVERGED + "bar.sync",
    ),
    Bug(
        "mma in two branches of a warp",
        "sm80.cu mma_m16n8k16",
        (
            (
                "if (shapes & kM16n8) rx::mma_m16n8k16(d[0], a[0], b[0], b[1]);",
                "if (lane & 1) rx::mma_m16n8k16(d[0], a[0], b[0], b[1]);\n"
                "  else rx::mma_m16n8k16(d[0], a[0], b[0], b[1]);",
            ),
        ),
        DIVERGED + "mma",
    ),
    Bug(
        "ldmatrix in two branches of a warp",
        "sm80.cu ldmatrix_x4",
        (
            (
                "if (kind == 0) rx::ldmatrix_x4(r, addr);",
                "if (lane < 4) rx::ldmatrix_x4(r, addr);\n  else rx::ldmatrix_x4(r, addr);",
            ),
        ),
        DIVERGED + "ldmatrix",
    ),
    Bug(
        "cluster barrier in two branches of a warp",
        "sm90.cu bulk_hand_back",
        (
            (
                "  const uint32_t rank = rx::cluster_rank();\n  for (uint32_t round = 0",
                "  if (threadIdx.x < 8) cluster_sync();\n  else cluster_sync();\n"
                "  const uint32_t rank = rx::cluster_rank();\n  for (uint32_t round = 0",
            ),
        ),
        DIVERGED + r"barrier\.cluster",
    ),
    Bug(
        "wgmma in two branches of a warp",
        "sm90a.cu wgmma_setmaxnreg",
        (
            (
                "    rx::wgmma<64>(d, tile, tile, 0);",
                "    if (t & 1) rx::wgmma<64>(d, tile, tile, 0);\n"
                "    else rx::wgmma<64>(d, tile, tile, 0);",
            ),
        ),
        DIVERGED + "wgmma",
    ),
    Bug(
        "setmaxnreg in two branches of a warp",
        "sm90a.cu wgmma_setmaxnreg",
        (
            (
                "    rx::setmaxnreg_dec<40>();",
                "    if (t & 1) rx::setmaxnreg_dec<40>();\n    else rx::setmaxnreg_dec<40>();",
            ),
        ),
        DIVERGED + "setmaxnreg",
    ),
]
