"""One convention for all kernel families: the same files, the same entries, each declared once."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from emulator.build import KERNELS
from recurx.backends import cuda_abi
from recurx.errors import CudaError

FAMILIES = sorted(cuda_abi.FAMILIES.values())
API = re.sub(r"/\*.*?\*/", "", (KERNELS / "api.h").read_text(), flags=re.DOTALL)
DECLARED = set(re.findall(r"\b(rx_\w+)\(", API))


def test_every_folder_with_a_kernel_is_a_family() -> None:
    assert sorted(path.parent.name for path in KERNELS.rglob("kernel.cuh")) == FAMILIES
    assert sorted(path.name for path in KERNELS.iterdir() if path.is_dir()) == [*FAMILIES, "rx"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_the_files_and_entries_of_the_others(family: str) -> None:
    names = {path.name for path in (KERNELS / family).iterdir()}
    parts = {"layout.cuh", "states.cuh", "product.cuh", "attention.cuh", "token_mlp.cuh"}
    assert {"kernel.cuh", "launch.cu", "pack.cu", *parts} <= names
    entries = {f"rx_{family}_{what}" for what in ("run", "scratch_bytes", "tape_bytes")}
    assert entries <= DECLARED
    assert (f"rx_{family}_pack" in DECLARED) == (family != "grid_sm80")  # that one is Python's


def test_python_calls_what_is_declared_and_no_more() -> None:
    bound = set(re.findall(r"RX_ENTRY\((rx_\w+)\)", (KERNELS / "bindings.cpp").read_text()))
    assert bound | {"rx_cuda_device_count", "rx_cluster_sm90a_places"} == DECLARED  # of C++ alone
    general = {
        "rx_cuda_last_error",
        "rx_cuda_error_name",
        "rx_struct_sizes",
        "rx_timeline_compiled",
    }
    assert set(cuda_abi._CODES) | set(cuda_abi._BYTES) | general == bound


def test_structs_are_mirrored_in_the_declared_order() -> None:
    said = re.search(r"sizeof of: (.*?)\. \*/", (KERNELS / "api.h").read_text(), re.DOTALL)
    assert said is not None
    names = [mirrored.__name__ for mirrored in cuda_abi._MIRRORED]
    assert re.findall(r"Rx\w+", said[1]) == names
    assert set(re.findall(r"\} (Rx\w+);", API)) == set(names)


def test_kernels_of_another_recurx_are_refused() -> None:
    older = SimpleNamespace(cuda_entries=lambda: {"rx_cuda_last_error": 1, "rx_recursion_abi": 1})
    with pytest.raises(CudaError, match=r"another recurx; rebuild recurx\._C"):
        cuda_abi.Library(older)  # type: ignore[arg-type]
