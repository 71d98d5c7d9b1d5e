"""The inline PTX of every rx:: wrapper writes the golden words, as its host body does.

The kernels are those of ../wrappers: here nvcc compiles them, and its PTX runs in the emulator in
the place of the C++.
"""

from __future__ import annotations

import numpy as np
import pytest

from aot import toolchain

from .. import wrapper_cases
from ..build import unavailable
from .run import load_ptx

pytestmark = [
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
    pytest.mark.skipif(toolchain.find_nvcc() is None, reason="nvcc is not here"),
]
ARCHS = {"sm80.cu": "80", "sm90.cu": "90", "sm90a.cu": "90a"}


@pytest.mark.parametrize("file", wrapper_cases.FILES)
def test_the_ptx_of_every_wrapper(file):
    source = wrapper_cases.FOLDER / file
    ptx = toolchain.nvcc_compile(source, ARCHS[file], to="ptx").cubin.read_text()
    library = load_ptx([ptx], [source, wrapper_cases.FOLDER / "errors.cu"])
    golden = np.load(wrapper_cases.GOLDEN)
    for name in wrapper_cases.names(library.library):
        for seed in (1, 2):
            library.configure(race=1, seed=seed)
            assert np.array_equal(wrapper_cases.run(library, name), golden[name]), name
