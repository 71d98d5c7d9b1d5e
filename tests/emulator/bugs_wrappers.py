"""Bugs planted in the wrapper kernels: what the GEMM kernels have no use for."""

from __future__ import annotations

from .planted import Bug

FENCED = "  rx::fence_proxy_async();\n  __syncthreads();\n\n"  # before the first wgmma
WGMMA, GROUPS = "sm90a.cu wgmma_64", "sm80.cu cp_async_groups"
NAMED, STORE = "sm80.cu named_barrier", "sm90.cu bulk_store"
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
        (("i] = 7 * i;\n  rx::fence_proxy_async();", "i] = 7 * i;"),),
        "missing fence.proxy.async after a generic write at global memory",
    ),
]
