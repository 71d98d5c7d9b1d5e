"""The cluster recursion from the PTX that nvcc emits, with the race checker on."""

from __future__ import annotations

import pytest

from .. import build
from ..cluster_recursion import ATT, FILES, MLP, Case, Shape, outcome

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable())),
]
from aot import toolchain  # noqa: E402

from .run import load_ptx  # noqa: E402


@pytest.mark.skipif(toolchain.find_nvcc() is None, reason="nvcc is not here")
def test_nvcc_ptx():
    texts = [
        toolchain.nvcc_compile(build.KERNELS / name, "90a", to="ptx").cubin.read_text()
        for name in FILES
        if name != "runtime.cu"
    ]
    library = load_ptx(texts, FILES, wanted="ILi128E|cluster_pack")
    for kinds in ((ATT,), (MLP,)):
        case = Case(Shape(kinds, tokens=70, batch=2, cluster=4))
        assert outcome(library, case, race=1, seed=1) == "right"
    assert library.stat("flop") > 0, "the C++ ran in the place of the PTX"
