"""The microbenchmarks of bench/gpu_check: in the emulator with its race checker, and compiled."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from aot import resources, toolchain
from emulator.build import Emulated, build, unavailable

MICRO = toolchain.CUDA_FOLDER.parents[1] / "bench" / "gpu_check" / "micro.cu"
READERS, THREADS, STAGE = 224, 256, 16384
EMULATED = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
NVCC = pytest.mark.skipif(toolchain.find_nvcc() is None, reason="nvcc is not here")


@pytest.fixture(scope="module")
def micro():
    return Emulated(build([MICRO], True), True)


def aligned(words: int) -> np.ndarray:
    raw = np.zeros(words + 64, np.uint32)
    return raw[-raw.ctypes.data % 256 // 4 :][:words]


def pointer(words: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(words.ctypes.data)


def drawn(words: int) -> np.ndarray:
    data = aligned(words)
    data[:] = np.random.default_rng(0).integers(0, 2**32, words, np.uint32)
    return data


@EMULATED
def test_everybody_meets_at_every_barrier(micro):
    for seed in (1, 2, 3):
        micro.configure(seed=seed)
        arrived = aligned(1)
        micro.watch(arrived.ctypes.data, 4, "arrived")
        micro.call("rx_micro_barrier", 3, 5, pointer(arrived), None)
        micro.unwatch_all()
        assert arrived[0] == 15


@EMULATED
def test_every_cta_reads_all_of_the_data(micro):
    data, sums = drawn(4 * 300), aligned(2 * THREADS)
    micro.call("rx_micro_sweep", 2, pointer(data), 300, 3, pointer(sums), None)
    vectors = data.reshape(-1, 4)
    want = 3 * np.bitwise_xor.reduce(vectors, 1).sum(dtype=np.uint64)
    assert (sums.reshape(2, -1).sum(1, dtype=np.uint64) % 2**32 == want % 2**32).all()


@EMULATED
@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_a_ring_brings_every_byte_to_every_cta_of_a_cluster(micro, cluster):
    """More stages than the ring holds, so that each is handed back and filled again."""
    stages, sweeps = 5, 2
    data = drawn(stages * STAGE // 4)
    for seed in (1, 2):
        micro.configure(seed=seed)
        sums = aligned(2 * cluster * READERS)
        micro.call(
            "rx_micro_multicast", 2, cluster, pointer(data), stages, sweeps, 1, pointer(sums), None
        )
        found = sums.reshape(2 * cluster, -1).sum(1, dtype=np.uint64) % 2**32
        assert (found == sweeps * data.sum(dtype=np.uint64) % 2**32).all()


@NVCC
def test_compiles_for_hopper_without_spills():
    usages = resources.read(toolchain.nvcc_compile(MICRO, "90a", to="cubin"), "90a")
    needs = {"multicast": resources.Need(tensor=(), bulk=True)}
    assert len(usages) == 3
    for usage in usages:
        need = next((n for name, n in needs.items() if name in usage.kernel), None)
        assert usage.faults(need or resources.Need(tensor=())) == [], usage


@NVCC
def test_a_compiled_library_is_found_from_another_checkout(tmp_path):
    """Its name depends on contents alone: a cache that is carried along serves there."""
    copy = tmp_path / "elsewhere" / MICRO.name
    copy.parent.mkdir()
    copy.write_bytes(MICRO.read_bytes())
    assert toolchain.identity([copy]) == toolchain.identity([MICRO])
    copy.write_text(MICRO.read_text() + "\n// changed\n")
    assert toolchain.identity([copy]) != toolchain.identity([MICRO])
    with pytest.raises(AssertionError):
        toolchain.cached("gpu", ".so", MICRO)
