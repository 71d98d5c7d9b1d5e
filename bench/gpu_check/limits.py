"""What the cost model assumes of the device, measured: clusters, barriers, L2, multicast."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import torch
from nvcc_library import CudaError, call, library, pointer
from torch import Tensor

from bench.gpu_check import sizes
from bench.gpu_check.build import MICRO
from bench.gpu_check.child import ABSENT
from bench.gpu_check.journal import emit
from recurx.bench import ceilings

STAGE, READERS, THREADS = 16384, 224, 256  # of micro.cu
CLUSTERS = (2, 4, 8, 16)
# Threads and bytes of a CTA: of the cluster kernel, of the grid kernel, of a small one.
SHAPES = ((384, 227 << 10), (256, 200 << 10), (256, 64 << 10))
SPREAD = 5  # timings of each


def main() -> int:
    emit("ceilings", **ceilings.ceilings_of("cuda", 1 << 15, 512, 1536))
    if torch.cuda.get_device_capability() != (9, 0):
        emit("micro", absent="these kernels are for compute capability 9.0")
        return ABSENT
    lib = library([MICRO], "90a")
    lib.rx_cuda_last_error.restype = ctypes.c_char_p
    return int(not all([_said(clusters, lib), _said(barrier, lib), *(
        _said(sweep, lib, nbytes) for nbytes in sizes.MICRO["swept"]
    ), *(_said(multicast, lib, size) for size in (1, *CLUSTERS[:3])
        if size <= _multiprocessors())]))  # fmt: skip


def _said(probe: Callable[..., None], lib: ctypes.CDLL, *arguments: int) -> bool:
    """Whether it worked; the others go on."""
    try:
        probe(lib, *arguments)
    except (CudaError, AssertionError) as error:
        emit("failed", probe=probe.__name__, arguments=arguments, why=str(error))
        return False
    return True


def _multiprocessors() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


def clusters(lib: ctypes.CDLL) -> None:
    """How many clusters run at once, by size."""
    for threads, shared in SHAPES:
        found = {}
        for size in CLUSTERS:
            count = ctypes.c_int()
            if lib.rx_micro_max_clusters(size, threads, shared, ctypes.byref(count)):
                found[size] = lib.rx_cuda_last_error().decode()
            else:
                found[size] = count.value
        emit("max active clusters", threads=threads, shared_bytes=shared, by_size=found)


def barrier(lib: ctypes.CDLL) -> None:
    ctas, rounds = _multiprocessors(), sizes.MICRO["rounds"]
    arrived = torch.zeros(1, dtype=torch.int32, device="cuda")
    seconds = _best(lib, "rx_micro_barrier", ctas, rounds, pointer(arrived), before=arrived.zero_)
    assert arrived.item() == ctas * rounds, f"{arrived.item()} arrivals"
    emit("grid barrier", ctas=ctas, rounds=rounds, us=1e6 * seconds / rounds)


def sweep(lib: ctypes.CDLL, nbytes: int) -> None:
    """All CTAs read the same bytes again and again: from L2 as long as they fit."""
    ctas, sweeps, count = _multiprocessors(), sizes.MICRO["sweeps"], nbytes // 16
    data, sums = _data(nbytes), torch.zeros(ctas * THREADS, dtype=torch.int32, device="cuda")
    seconds = _best(
        lib, "rx_micro_sweep", ctas, pointer(data), count, sweeps, pointer(sums)
    )  # fmt: skip
    words = data.view(-1, 4)
    want = sweeps * (words[:, 0] ^ words[:, 1] ^ words[:, 2] ^ words[:, 3]).sum(dtype=torch.int64)
    _same(sums.view(ctas, -1), want)
    emit("read by all", bytes=nbytes, gbs=1e-9 * ctas * nbytes * sweeps / seconds)


def multicast(lib: ctypes.CDLL, size: int) -> None:
    """A tape read from L2 once a cluster, by all the clusters that fit."""
    stages, sweeps = sizes.MICRO["tape_bytes"] // STAGE, sizes.MICRO["sweeps"]
    count = _multiprocessors() // size
    data = _data(stages * STAGE)
    sums = torch.zeros(count * size * READERS, dtype=torch.int32, device="cuda")
    call(lib, "rx_micro_multicast", count, size, pointer(data), stages, 1, 1, pointer(sums), None)
    _same(sums.view(count * size, -1), data.sum(dtype=torch.int64))
    seconds = _best(
        lib, "rx_micro_multicast", count, size, pointer(data), stages, sweeps, 0, pointer(sums)
    )
    arrived = 1e-9 * count * size * data.nbytes * sweeps / seconds
    emit("multicast", cluster=size, clusters=count, arriving_gbs=arrived, l2_gbs=arrived / size)


def _data(nbytes: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (nbytes // 4,), dtype=torch.int32, device="cuda")


def _same(sums: Tensor, want: Tensor) -> None:
    """Sums of 32 bits that wrap round."""
    found = sums.sum(1, dtype=torch.int64)
    wrong = int(((found - want) % 2**32 != 0).sum())
    assert not wrong, f"the sums of {wrong} of {len(found)} CTAs are wrong"


def _best(
    lib: ctypes.CDLL, entry: str, *arguments: object, before: Callable[[], object] = lambda: None
) -> float:
    """Seconds by events: the shortest of several."""
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    times = []
    for _ in range(SPREAD):
        before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        code = getattr(lib, entry)(*arguments, stream)
        end.record()
        if code:
            raise CudaError(lib.rx_cuda_last_error().decode())
        torch.cuda.synchronize()
        times.append(1e-3 * start.elapsed_time(end))
    return min(times)


if __name__ == "__main__":
    sys.exit(main())
