"""What a user installs: wheel, editable and bare checkout, with and without a compiler."""

import importlib.metadata
import json
import os
import re
from pathlib import Path

import pytest

from tests.checkouts import ROOT, build, copy_checkout, fake_nvcc, python, unpacked_wheel


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the package is made of, under a path with a space, with a small csrc/."""
    return copy_checkout(tmp_path_factory.mktemp("packaging") / "a checkout")


@pytest.fixture(scope="module")
def installed(checkout):
    return unpacked_wheel(checkout, "wheel", RECURX_CUDA="0")


@pytest.fixture(scope="module")
def installed_pure(checkout):
    return unpacked_wheel(checkout, "wheel", PATH="/no/such/folder")


# -S: without site-packages, where recurx may be installed in some other way.
WHERE = "import recurx, recurx.kernels as k; print(recurx.__file__, k.__file__, sep='\\n')"


def test_wheel_holds_the_package_the_kernels_and_the_module(installed):
    files = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert {"recurx/py.typed", "recurx/_build_info.py", "recurx/kernels/__init__.py"} <= files
    assert any(re.fullmatch(r"recurx/_C\..*\.so", name) for name in files)
    for source in ROOT.glob("kernels/**/*.py"):
        assert f"recurx/kernels/{source.relative_to(ROOT / 'kernels')}" in files
    for source in ROOT.glob("recurx/**/*.py"):
        assert str(source.relative_to(ROOT)) in files
    unbuilt = [path for path in ROOT.glob("recurx/**/*") if path.is_file()]
    data = {path for path in unbuilt if path.suffix not in (".py", ".pyc", ".so")}
    data = {path for path in data if path.name != "NOTES.md"}  # for those who have the source
    assert {"py.typed", "sudoku-9x9.safetensors", "sudoku-6x6.safetensors"} <= {
        path.name for path in data
    }
    assert all(str(path.relative_to(ROOT)) in files for path in data)
    assert {name.split("/")[0].split("-")[0] for name in files} == {"recurx"}


def test_wheel_imports_away_from_the_checkout(installed, tmp_path):
    source = f"{WHERE}; import recurx._C"
    where = python(source, cwd=tmp_path, options=["-S"], PYTHONPATH=str(installed))
    assert where.split("\n")[:2] == [
        f"{installed}/recurx/__init__.py",
        f"{installed}/recurx/kernels/__init__.py",
    ]


def test_install_without_a_compiler_is_pure_python_and_says_so(installed_pure, tmp_path):
    assert not list(installed_pure.rglob("*.so"))
    source = "import recurx.kernels; from recurx._build_info import INFO; print(INFO['sentence'])"
    said = python(source, cwd=tmp_path, PYTHONPATH=str(installed_pure))
    assert "pure Python" in said
    assert "no C++ compiler (c++ is not on PATH; g++ is not on PATH; clang++ is not" in said


def test_metadata_is_that_of_the_project_and_not_of_the_build_host(installed, installed_pure):
    (path,), (pure,) = installed.glob("*.dist-info"), installed_pure.glob("*.dist-info")
    assert (path / "METADATA").read_text() == (pure / "METADATA").read_text()
    distribution = importlib.metadata.PathDistribution(path)
    metadata = distribution.metadata
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    runtime = [line for line in distribution.requires or [] if "extra ==" not in line]
    assert {re.match(r"[\w-]+", line).group() for line in runtime} == {
        "torch",
        "numpy",
        "safetensors",
        "jinja2",
        "rich",
    }
    assert "torch>=2.7.1" in runtime  # and no upper bound
    (script,) = distribution.entry_points.select(group="console_scripts")
    assert (script.name, script.value) == ("recurx", "recurx.commands:main")


def test_editable_install_finds_the_kernels(checkout, tmp_path):
    site = unpacked_wheel(checkout, "editable", RECURX_NATIVE="0")
    source = f"import site; site.addsitedir({str(site)!r}); {WHERE}"
    where = python(source, cwd=tmp_path, options=["-S"])
    assert where.split("\n")[:2] == [
        f"{checkout}/recurx/__init__.py",
        f"{checkout}/kernels/__init__.py",
    ]


def test_bare_checkout_finds_the_kernels(checkout, tmp_path):
    where = python(WHERE, cwd=tmp_path, options=["-S"], PYTHONPATH=str(checkout))
    assert where.split("\n")[1] == f"{checkout}/kernels/__init__.py"


# ------------------------------------------------------------------ the native build


@pytest.fixture
def cuda_checkout(tmp_path):
    checkout = copy_checkout(tmp_path / "checkout")
    (checkout / "csrc" / "cuda").mkdir()
    (checkout / "csrc" / "cuda" / "kernel.cu").write_text("int kernel() { return 0; }\n")
    return checkout


HAS_CUDA = "import recurx._C; print(hasattr(recurx._C, 'cuda'))"


def test_nvcc_behind_a_shell_script_is_found_and_used(cuda_checkout, tmp_path, monkeypatch):
    toolkit = fake_nvcc(tmp_path / "toolkit", compiles=True)
    path = f"{toolkit}/path:{os.environ['PATH']}"
    _, said = build(cuda_checkout, PATH=path, CUDA_HOME="", CUDA_PATH="")
    assert "CUDA kernels (sm_80, sm_90; nvcc 13.0.88 from nvcc on PATH)" in said
    ninja = next(cuda_checkout.glob("build/*/build.ninja")).read_text()
    assert f"{toolkit}/bin/nvcc" in ninja and f"{toolkit}/path" not in ninja
    assert python(HAS_CUDA, cwd=cuda_checkout).strip() == "True"


def test_nvcc_of_nvidias_wheels_is_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "csrc")
    import native_tools

    for variable in ("CUDA_HOME", "CUDA_PATH", "RECURX_CUDA_ARCHS"):
        monkeypatch.delenv(variable, raising=False)
    fake_nvcc(tmp_path / "nvidia" / "cu13", compiles=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.syspath_prepend(tmp_path)
    found = native_tools.find_cuda()
    assert found.found_by == "NVIDIA's PyPI wheels"
    assert (found.version, found.archs) == ("13.0.88", ("80", "90"))

    (tmp_path / "nvidia" / "cu13" / "lib64" / "libcudart_static.a").unlink()
    with pytest.raises(native_tools.NotFound, match=r"no nvcc on PATH; .* has no libcudart_static"):
        native_tools.find_cuda()


def test_cuda_that_does_not_compile_leaves_the_cpu_engine(cuda_checkout, tmp_path):
    toolkit = fake_nvcc(tmp_path / "toolkit", compiles=False)
    _, said = build(cuda_checkout, CUDA_HOME=str(toolkit))
    assert "without CUDA: nvcc 13.0.88 does not compile csrc/cuda" in said
    assert python(HAS_CUDA, cwd=cuda_checkout).strip() == "False"


def test_cuda_asked_for_and_not_to_be_had_is_an_error(cuda_checkout, tmp_path):
    toolkit = fake_nvcc(tmp_path / "toolkit", compiles=False)
    status, said = build(cuda_checkout, check=False, CUDA_HOME=str(toolkit), RECURX_CUDA="1")
    assert status != 0 and "do not compile" in said
    assert not list(cuda_checkout.glob("recurx/_C*"))


def test_sources_that_do_not_compile_are_an_error_not_a_pure_install(checkout, tmp_path):
    broken = copy_checkout(tmp_path / "broken")
    (broken / "csrc" / "cpu" / "wrong.cpp").write_text("this is no C++\n")
    status, said = build(broken, check=False, RECURX_CUDA="0")
    assert status != 0 and "do not compile" in said and "RECURX_NATIVE=0" in said


def test_a_later_pure_build_removes_the_module(tmp_path):
    checkout = copy_checkout(tmp_path / "checkout")
    build(checkout, RECURX_CUDA="0")
    assert list(checkout.glob("recurx/_C*.so"))
    build(checkout, RECURX_NATIVE="0")
    assert not list(checkout.glob("recurx/_C*.so"))


def test_instruction_sets_come_from_the_file_name(tmp_path):
    """Each file sees its own flags, all see which were compiled, the lowest is linked first."""
    checkout = copy_checkout(tmp_path / "checkout")
    macros = {
        "amx_split": "__AMX_BF16__",
        "amx": "__AMX_BF16__",
        "avx512_bf16": "__AVX512BF16__",
        "avx512": "__AVX512BW__",
        "avx2": "__FMA__",
    }
    for isa, macro in macros.items():
        guard = f"#if !defined({macro}) || !defined(RX_HAVE_AVX2)\n#error flags\n#endif\n"
        (checkout / "csrc" / "cpu" / f"gemm_{isa}.cpp").write_text(guard)
    (checkout / "csrc" / "cpu" / "plain.cpp").write_text(
        "#if defined(__AVX2__) || !defined(RX_HAVE_AVX2)\n#error flags\n#endif\n"
    )
    build(checkout, RECURX_CUDA="0")
    ninja = next(checkout.glob("build/*/build.ninja")).read_text()
    linked = re.search(r"^build _C\S+: link (.*)$", ninja, re.MULTILINE).group(1).split()
    assert [Path(name).stem for name in linked] == [
        "bindings.cpp",
        "plain.cpp",
        "gemm_avx2.cpp",
        "gemm_avx512.cpp",
        "gemm_avx512_bf16.cpp",
        "gemm_amx.cpp",
        "gemm_amx_split.cpp",
    ]


@pytest.mark.parametrize(
    ("file", "archs", "targets"),
    [
        ("block.cu", ("80", "90"), ["80,code=sm_80", "90,code=sm_90", "90,code=compute_90"]),
        ("block_sm80/launch.cu", ("90",), ["90,code=sm_90", "90,code=compute_90"]),
        ("block_sm90a/launch.cu", ("80", "90"), ["90a,code=sm_90a"]),
        ("block_sm90a/launch.cu", ("80",), []),
        (  # a GPU between the generations, such as sm_110, compiles the PTX of the one below them
            "block.cu",
            ("90", "100", "120"),
            ["90,code=sm_90", "100,code=sm_100", "120,code=sm_120", "90,code=compute_90"],
        ),
        ("block.cu", ("80",), ["80,code=sm_80", "80,code=compute_80"]),
    ],
)
def test_gpu_targets_come_from_the_folder_name(file, archs, targets, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "csrc")
    import native_tools

    assert native_tools.gencode(file, archs) == [f"-gencode=arch=compute_{t}" for t in targets]


@pytest.mark.parametrize(
    ("wanted", "archs"),
    [
        ("all", ("80", "86", "89", "90", "100", "120")),
        ("80;120", ("80", "120")),
        ("90", ("90",)),
        ("", ("80", "90")),
    ],
)
def test_a_variable_chooses_the_generations(wanted, archs, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "csrc")
    import native_tools

    monkeypatch.setenv("RECURX_CUDA_ARCHS", wanted)
    monkeypatch.setattr(native_tools, "_newer_archs_here", set)
    assert native_tools._wanted_archs() == archs


def test_a_wheel_holds_code_for_every_tested_generation(monkeypatch):
    """Code of a generation runs on later ones with the same first digit."""
    monkeypatch.syspath_prepend(ROOT / "csrc")
    from native_tools import ALL_CUDA_ARCHS, WHEEL_CUDA_ARCHS

    assert set(WHEEL_CUDA_ARCHS) <= set(ALL_CUDA_ARCHS)
    for arch in map(int, ALL_CUDA_ARCHS):
        held = map(int, WHEEL_CUDA_ARCHS)
        assert any(own <= arch and own // 10 == arch // 10 for own in held), arch


def test_csrc_includes_no_torch_header():
    sources = [path for path in ROOT.glob("csrc/**/*") if path.suffix in {".cpp", ".hpp", ".cu"}]
    assert ROOT / "csrc" / "bindings.cpp" in sources
    for path in sources:
        assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10)/", path.read_text()), path


# ------------------------------------------------------------------ what `import recurx` costs


def test_import_is_lazy_and_quick():
    """`import recurx` adds under 0.3 s to torch, and its first use brings in no compiler either."""
    source = """
        import json, sys, time, torch
        before, start = set(sys.modules), time.perf_counter()
        import recurx
        seconds, imported = time.perf_counter() - start, set(sys.modules) - before
        recurx.recurse, recurx.Schedule, recurx.explain
        print(json.dumps([seconds, sorted(imported), sorted(set(sys.modules) - before)]))
    """
    seconds, imported, used = json.loads(python(source, cwd=ROOT))
    assert imported == ["recurx", "recurx._checkout"]
    assert seconds < 0.3
    assert "recurx.api" in used
    assert not {"torch._dynamo", "torch._inductor", "triton", "rich", "safetensors"} & set(used)


def test_every_public_name_loads_without_the_optional_parts():
    """No triton, no compiled module, no build tools: all of recurx's names still import."""
    source = """
        import sys

        class Absent:
            names = ("triton", "recurx._C", "recurx._build_info", "pybind11", "ninja", "pytest")

            def find_spec(self, name, path=None, target=None):
                if name in self.names:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Absent())
        import recurx
        for name in recurx.__all__:
            getattr(recurx, name)
        import recurx.kernels, recurx.bench.env
        facts = {fact.name: fact for fact in recurx.bench.env.collect()}
        assert facts["eager"].ok, facts["eager"]
        for name in ("triton", "recurx._C", "build", "cpu"):
            assert not facts[name].ok and facts[name].value, facts[name]
    """
    python(source, cwd=ROOT)
