"""The hardware writes the same words as the emulator, for every rx:: wrapper.

The kernels are those of ../emulator/wrappers; tests/golden/wrappers.npz holds the emulator's words.
Without a GPU the first test still holds: all of it compiles, loads, and refuses to run in words.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from nvcc_library import CudaError, call, library, pointer, runs_here

from aot import toolchain
from emulator import wrapper_cases

pytestmark = pytest.mark.skipif(toolchain.find_nvcc() is None, reason="nvcc is not here")
ARCHS = {"sm80.cu": "80", "sm90.cu": "90", "sm90a.cu": "90a"}
GUARD = 64  # words behind the output that nobody may write


def built(file: str) -> ctypes.CDLL:
    sources = [wrapper_cases.FOLDER / file, wrapper_cases.FOLDER / "errors.cu"]
    return library(sources, ARCHS[file])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("file", ARCHS)
def test_compiles_and_says_that_there_is_no_device(file):
    lib = built(file)
    assert sorted(wrapper_cases.names(lib)) == sorted(set(wrapper_cases.names(lib)))
    with pytest.raises(CudaError, match=r"cudaError|CUDA driver|no CUDA-capable device"):
        call(lib, "rx_wrapper_run", 0, ctypes.c_void_p(0), None)


@pytest.mark.gpu
@pytest.mark.parametrize("file", ARCHS)
def test_writes_the_golden_words(file):
    if not runs_here(ARCHS[file]):
        pytest.skip(f"sm_{ARCHS[file]} code does not run on this device")
    lib, golden = built(file), np.load(wrapper_cases.GOLDEN)
    wrong = []
    for index, name in enumerate(wrapper_cases.names(lib)):
        count = lib.rx_wrapper_words(index)
        out = torch.full((count + GUARD,), -1, dtype=torch.int32, device="cuda")
        call(lib, "rx_wrapper_run", index, pointer(out), None)
        words = out.cpu().numpy().view(np.uint32)
        assert (words[count:] == 0xFFFFFFFF).all(), f"{name} wrote behind its output"
        differing = np.flatnonzero(words[:count] != golden[name])
        if differing.size:
            at = differing[0]
            wrong.append(
                f"{name}: {differing.size} of {count} words differ, the first is word {at}: "
                f"device {words[at]:#010x}, emulator {golden[name][at]:#010x}"
            )
    assert not wrong, "\n".join(wrong)
