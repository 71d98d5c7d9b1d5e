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

WIDTH = "RX_CLUSTER_WIDTHS(X)"


@pytest.mark.skipif(toolchain.find_nvcc() is None, reason="nvcc is not here")
def test_nvcc_ptx(tmp_path):
    texts = [
        toolchain.nvcc_compile(build.KERNELS / name, "90a", "ptx", flags).cubin.read_text()
        for name, flags in ((FILES[0], (f"-D{WIDTH}=X(128)",)), (FILES[1], ()))
    ]
    host = tmp_path / "cluster_128.cu"
    host.write_text(f'#define {WIDTH} X(128)\n#include "{build.KERNELS / FILES[0]}"\n')
    library = load_ptx(texts, [host, *FILES[1:]])
    for kinds in ((ATT,), (MLP,)):
        case = Case(Shape(kinds, tokens=70, batch=2, cluster=4))
        assert outcome(library, case, race=1, seed=1) == "right"
    assert library.stat("flop") > 0, "the C++ ran in the place of the PTX"
