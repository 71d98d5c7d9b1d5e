"""The GEMM + residual + rms kernels are right in the emulator, and it finds nothing to report."""

import ctypes
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from emulator import gemm_residual_rms as gemm
from emulator.build import Emulated, EmulatorFault, build, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

# (m, n, k, cluster rows): full and partial row blocks, rings shorter and longer than the tiles
SM80_SHAPES = [(1, 64, 64), (32, 64, 256), (43, 128, 320), (33, 384, 192), (97, 512, 128)]
SM90A_SHAPES = [(1, 128, 64, 1), (129, 256, 128, 1), (97, 512, 320, 1), (200, 384, 384, 2)]
SM90A_SHAPES += [(300, 128, 448, 2), (64, 512, 64, 2)]


@pytest.fixture(scope="module")
def libraries():
    return {kernel: gemm.load(kernel, checked=True) for kernel in gemm.FILES}


def check(library, kernel, shape, seeds):
    case = gemm.Case(*shape)
    outs = []
    for seed in seeds:
        library.configure(seed=seed)
        outs.append(case.run(library, kernel))
        assert case.compare(outs[-1]) is None, f"seed {seed}: {case.compare(outs[-1])}"
    for out in outs[1:]:
        assert np.array_equal(out, outs[0]), "another schedule gave other bits"


@pytest.mark.parametrize("shape", SM80_SHAPES, ids=str)
def test_sm80_is_right_and_clean_under_ten_seeds(libraries, shape):
    check(libraries["sm80"], "sm80", shape, range(1, 11))


@pytest.mark.parametrize("shape", SM90A_SHAPES, ids=str)
def test_sm90a_is_right_and_clean_under_ten_seeds(libraries, shape):
    check(libraries["sm90a"], "sm90a", shape, range(1, 11))


@pytest.mark.parametrize("policy", ["eager", "lazy"])
def test_copies_may_be_early_or_late(libraries, policy):
    for kernel, shape in (("sm80", (43, 128, 320)), ("sm90a", (200, 128, 832, 2))):
        libraries[kernel].configure(**{"async": ["eager", "lazy"].index(policy)})
        check(libraries[kernel], kernel, shape, [1])
        libraries[kernel].configure(**{"async": 2})


def test_threads_may_be_switched_at_every_access(libraries):
    for kernel, shape in (("sm80", (20, 64, 64)), ("sm90a", (40, 128, 64, 1))):
        libraries[kernel].configure(yield_chance=0.5)
        check(libraries[kernel], kernel, shape, [1, 2])
        libraries[kernel].configure(yield_chance=0)


def test_a_library_keeps_few_mappings(tmp_path):
    # A process that loads hundreds of libraries otherwise runs out of them (vm.max_map_count), and
    # then nothing maps any more: no library, no thread, no page.
    mine = shutil.copy(gemm.load("sm90a", checked=False).library._name, tmp_path)
    library, before = Emulated(Path(mine), checked=False), mappings()
    check(library, "sm90a", (200, 128, 832, 2), [1])
    assert mappings() - before < 2 * 64 + 50, "two a stack, of at most 64 stacks, and other memory"


def mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def test_output_may_be_the_residual(libraries):
    for kernel, library in libraries.items():
        case = gemm.Case(70, 128, 128)
        params, keep = case.params(library, kernel, out=case.residual)
        library.call(f"rx_gemm_residual_rms_{kernel}", *params)
        assert case.compare(case.residual) is None, keep


def test_ldmatrix_has_no_bank_conflicts(libraries, tmp_path):
    case = gemm.Case(32, 128, 64)
    library = libraries["sm80"]
    library.reset_stats()
    case.run(library, "sm80")
    assert library.stat("ldmatrix") > 0
    assert library.stat("ldmatrix_conflicts") == 0
    # The count bites: without the swizzle the same loads conflict, with the right result.
    old = "((c ^ (r >> 1 & 3)) << 4)"
    gemm.copy_sources(tmp_path)
    for path in tmp_path.rglob("*.*"):
        path.write_text(path.read_text().replace(old, "(c << 4)"))
    flat = gemm.load("sm80", checked=True, folder=tmp_path)
    assert case.compare(case.run(flat, "sm80")) is None
    assert flat.stat("ldmatrix_conflicts") >= 3 * flat.stat("ldmatrix")


def test_an_impossible_shape_is_refused(libraries):
    for kernel, library in libraries.items():
        case = gemm.Case(32, 96, 64)
        with pytest.raises(EmulatorFault, match=f"gemm_residual_rms_{kernel}: n is 96; .*512 are"):
            case.run(library, kernel)


def test_same_bits_without_the_race_checker(libraries):
    for kernel in gemm.FILES:
        case = gemm.Case(97, 512, 128)
        plain = gemm.load(kernel, checked=False)
        assert np.array_equal(case.run(plain, kernel), case.run(libraries[kernel], kernel))


def test_a_plain_build_refuses_the_race_checker():
    plain = gemm.load("sm80", checked=False)
    with pytest.raises(ValueError, match="does not show the emulator"):
        plain.configure(race=True)


def test_unknown_setting_is_refused(libraries):
    with pytest.raises(ValueError, match="no setting 'sed'"):
        libraries["sm80"].configure(sed=1)


def test_a_report_names_the_source_line(tmp_path):
    """Through addr2line: a race in plain C++ shows the file and line of both accesses."""
    body = "  if (threadIdx.x == 3) smem[0] = 1;\n  if (threadIdx.x == 9) smem[0] = 2;\n"
    with pytest.raises(EmulatorFault) as fault:
        one_warp(tmp_path, body).call("run")
    assert re.search(r"write after write at cta 0 dynamic shared memory byte 0", str(fault.value))
    lines = set(re.findall(r"kernel\.cu:\d", str(fault.value)))
    assert lines == {"kernel.cu:5", "kernel.cu:6"}


# (word of lane t, extra passes of the warp)
STRIDES = [("t", 0), ("t * 2", 1), ("t * 32", 31), ("t * 33", 0), ("t % 2 * 64", 1), ("0", 0)]


@pytest.mark.parametrize("word, extra", STRIDES)
def test_bank_conflicts_of_plain_accesses(tmp_path, word, extra):
    body = f"  const int t = threadIdx.x;\n  *(volatile unsigned*)(smem + 4 * ({word})) = t;\n"
    library = one_warp(tmp_path, body)
    library.configure(banks=True, race=False)
    library.call("run")
    assert (library.stat("plain_shared"), library.stat("plain_conflicts")) == (1, extra)


def one_warp(folder, body):
    """A kernel of one warp with 8 KB of shared memory `smem`; its body starts at line 5."""
    source = folder / "kernel.cu"
    source.write_text(
        '#include "rx/rx.cuh"\n#include "rx/launch.cuh"\n'
        "__global__ void kernel() {\n  RX_DYN_SMEM(smem);\n" + body + "}\n"
        'extern "C" int run() {\n'
        '  return rx::launch({"k", dim3(1), dim3(32), 8192}, nullptr, kernel);\n}\n'
        'extern "C" const char* rx_cuda_last_error() { return rx::last_error().c_str(); }\n'
    )
    return Emulated(build([source], checked=True), checked=True)


@pytest.mark.slow
def test_a_full_size_net_call_is_right(libraries):
    """97 rows of 512 and the weights of two blocks (6.8 M) in one product: about 1.7 GFLOP."""
    for kernel in gemm.FILES:
        check(libraries[kernel], kernel, (97, 512, 13312), [1])


def test_parameters_are_laid_out_as_in_c(tmp_path):
    source = tmp_path / "sizes.cu"
    source.write_text(
        '#include "gemm_residual_rms.h"\n#include <stddef.h>\n'
        'extern "C" int size() { return sizeof(RxGemmResidualRms); }\n'
        'extern "C" int eps() { return offsetof(RxGemmResidualRms, eps); }\n'
    )
    library = ctypes.CDLL(str(build([source], checked=False)))
    assert library.size() == ctypes.sizeof(gemm.Params)
    assert library.eps() == gemm.Params.eps.offset
