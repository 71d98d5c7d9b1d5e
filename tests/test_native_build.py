"""Which compiler builds the engines, when pip builds the CUDA kernels, and what is left without."""

import os
import re
import shutil
import sys

import pytest

from tests.checkouts import ROOT, build, copy_checkout, fake_nvcc, python, run, unpacked_wheel


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    copy = copy_checkout(tmp_path_factory.mktemp("native") / "checkout")
    (copy / "csrc" / "cuda").mkdir(exist_ok=True)
    (copy / "csrc" / "cuda" / "kernel.cu").write_text("int kernel() { return 0; }\n")
    return copy


@pytest.fixture
def tools(monkeypatch):
    """csrc/native_tools.py, in an environment that names no compiler."""
    monkeypatch.syspath_prepend(ROOT / "csrc")
    monkeypatch.delenv("CXX", raising=False)
    import native_tools

    return native_tools


def program(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


GXX = shutil.which("g++") or "c++"
BROKEN = "echo 'cc1plus: fatal error: no such shared library' >&2; exit 1"


# ------------------------------------------------------------------ compilers


def test_a_compiler_that_does_not_compile_gives_way_to_the_next(tools, tmp_path, monkeypatch):
    program(tmp_path / "c++", BROKEN)
    program(tmp_path / "g++", f'exec {GXX} "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert tools.find_compiler().command == ("g++",)


def test_where_none_compiles_each_is_named_with_its_own_words(tools, tmp_path, monkeypatch):
    program(tmp_path / "c++", BROKEN)
    (tmp_path / "g++").write_text("no program at all")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(tools.NotFound) as refused:
        tools.find_compiler()
    assert "c++ does not compile C++17: cc1plus: fatal error: no such shared" in str(refused.value)
    assert "g++ does not compile C++17: " in str(refused.value)
    assert "clang++ is not on PATH" in str(refused.value)


@pytest.mark.parametrize(
    ("named", "for_nvcc"),
    [
        (f"{GXX} -DONE=1", ["-ccbin", GXX, "-Xcompiler", "-DONE=1"]),
        (f"ccache {GXX}", ["-ccbin", GXX]),
        (f"ccache '{GXX}' -O1", ["-ccbin", GXX, "-Xcompiler", "-O1"]),
    ],
)
def test_cxx_may_be_several_words(named, for_nvcc, tools, tmp_path, monkeypatch):
    program(tmp_path / "ccache", 'exec "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CXX", named)
    found = tools.find_compiler()
    assert found.for_nvcc() == for_nvcc
    assert re.match(r"\d+\.\d+\.\d+$", found.version)
    monkeypatch.setenv("CXX", GXX)
    assert found.isas == tools.find_compiler().isas


def test_several_words_of_cxx_compile_the_module(checkout):
    _, said = build(checkout, CXX=f"{GXX} -DSEEN=1", RECURX_CUDA="0")
    assert f"recurx: compiling 1 files with {GXX} -DSEEN=1 " in said
    ninja = next(checkout.glob("build/*/build.ninja")).read_text()
    assert f"command = {GXX} -DSEEN=1 -std=c++17" in ninja
    python("import recurx._C", cwd=checkout)


def test_a_cxx_that_does_not_compile_is_an_error(checkout, tmp_path):
    broken = program(tmp_path / "broken", BROKEN)
    for named, words in ((broken, "no such shared library"), ("no-such-compiler", "not on PATH")):
        status, said = build(checkout, check=False, CXX=str(named))
        assert status != 0 and f"recurx: CXX={named}, but no C++ compiler" in said
        assert words in said
    # Asked for pure Python, it does not look at compilers.
    _, said = build(checkout, CXX="no-such-compiler", RECURX_NATIVE="0")
    assert "pure Python, no compiled engine: RECURX_NATIVE=0 asks for that" in said


def test_amx_is_known_by_the_macro_of_either_compiler(tools, tmp_path, monkeypatch):
    """clang before 16 defines __AMXBF16__ where gcc and later clangs define __AMX_BF16__."""
    for macro in ("__AMX_BF16__", "__AMXBF16__"):
        # A compiler of the old or the new kind: no AMX flags of its own, one macro of the two.
        old = program(
            tmp_path / macro,
            f"""amx=
            for word in "$@"; do
                shift
                case "$word" in
                -mamx-bf16) amx=-D{macro}=1 ;;
                -mamx-*) ;;
                *) set -- "$@" "$word" ;;
                esac
            done
            exec {GXX} -U__AMX_BF16__ $amx "$@" """,
        )
        monkeypatch.setenv("CXX", str(old))
        assert ("amx" in tools.find_compiler().isas) == ("avx512" in tools.find_compiler().isas)


# ------------------------------------------------------------------ CUDA, if torch can use it


@pytest.fixture(scope="module")
def toolkit(tmp_path_factory):
    return fake_nvcc(tmp_path_factory.mktemp("cuda") / "toolkit", compiles=True)


def said_by_pip(checkout, toolkit, cuda, **environment):
    """What a wheel's build says beside a torch whose version.py has `cuda`; None: no torch."""
    site = checkout.parent / "site"
    shutil.rmtree(site, ignore_errors=True)
    (site / "torch").mkdir(parents=True)
    if cuda is not None:
        text = f"__version__ = '9.1.0'\ncuda: Optional[str] = {cuda}\nhip: Optional[str] = None\n"
        (site / "torch" / "version.py").write_text(text)
    source = f"""
        import sys
        sys.path[:0] = [{str(site)!r}, "csrc"]
        import native_build, native_tools
        if {cuda is None}:
            native_tools._sites = lambda: [{str(site)!r}]
        from pathlib import Path
        print(native_build.build(Path("recurx"), by_pip=True))
    """
    return python(source, cwd=checkout, CUDA_HOME=str(toolkit), **environment)


def test_pip_builds_cuda_kernels_for_a_torch_that_has_cuda(checkout, toolkit):
    said = said_by_pip(checkout, toolkit, "'13.0'")
    assert "and the CUDA kernels (sm_80, sm_90; nvcc 13.0.88" in said
    assert "1 files with nvcc 13.0.88" in said  # before they are compiled
    assert "RECURX_CUDA=0 leaves it out" in said


def test_pip_builds_cuda_kernels_where_torch_is_yet_to_come(checkout, toolkit):
    assert "and the CUDA kernels" in said_by_pip(checkout, toolkit, None)


def test_pip_leaves_cuda_out_beside_a_torch_without_cuda(checkout, toolkit):
    said = said_by_pip(checkout, toolkit, "None")
    assert "without CUDA: torch 9.1.0 has no CUDA (RECURX_CUDA=1 builds the kernels" in said
    assert "and the CUDA kernels" in said_by_pip(checkout, toolkit, "None", RECURX_CUDA="1")


def test_a_checkout_builds_them_for_the_tests_that_read_machine_code(checkout, toolkit):
    _, said = build(checkout, CUDA_HOME=str(toolkit))
    assert "and the CUDA kernels" in said


# ------------------------------------------------------------------ other systems


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_elsewhere_than_on_linux_the_install_is_pure_python(system, checkout):
    source = f"""
        import sys
        sys.modules["fcntl"] = None  # as on Windows
        sys.path.insert(0, "csrc")
        import native_build
        from pathlib import Path
        sys.platform = {system!r}
        print(native_build.build(Path("recurx"), by_pip=True))
    """
    said = python(source, cwd=checkout, CXX="no-such-compiler")
    why = f"the engine is compiled on Linux, and this is {system}"
    assert f"pure Python, no compiled engine: {why}." in said
    assert not list(checkout.glob("recurx/_C*"))


def test_windows_imports_every_module_and_runs_eager():
    """All that Linux alone has is missing: fcntl, resource, affinity, triton, the module."""
    source = """
        import importlib, os, pkgutil, sys
        import torch, torch._dynamo, triton

        absent = ("triton", "recurx._C", "recurx._build_info", "fcntl", "resource", "termios")
        for name in list(sys.modules):
            if name.split(".")[0] in absent:
                del sys.modules[name]
        sys.modules.update(dict.fromkeys(absent))  # None: such an import fails
        sys.platform = "win32"
        del os.sched_getaffinity, os.fork

        import recurx
        needs_triton = ("triton_window",)
        for module in pkgutil.walk_packages(recurx.__path__, "recurx."):
            if module.name.split(".")[-1] not in (*needs_triton, "_C", "_build_info", "__main__"):
                importlib.import_module(module.name)
        from recurx.bench import env
        facts = {fact.name: fact for fact in env.collect()}
        assert facts["eager"].ok
        assert "compiled on Linux only, and this is win32" in facts["cpu"].value, facts["cpu"]
        assert "compiled on Linux only" in facts["build"].value, facts["build"]
        from tests.factories import make_inputs, make_net, rope
        schedule = recurx.Schedule.trm(2, 2)
        nets, (x, carry) = {"L": make_net("attention")}, make_inputs(schedule)
        print(recurx.recurse(schedule, nets, x, carry, cos_sin=rope())["z_H"].isfinite().all())
    """
    assert python(source, cwd=ROOT).strip() == "tensor(True)"


# ------------------------------------------------------------------ wheels and what they say


def test_the_command_that_brings_the_engines_names_where_this_copy_came_from(checkout, tmp_path):
    asked = "from recurx.errors import how_to_compile; print(how_to_compile())"
    assert f"python {checkout}/csrc/native_build.py" in python(asked, cwd=checkout)
    site = unpacked_wheel(checkout, "wheel", RECURX_NATIVE="0")
    isolated = dict(cwd=tmp_path, options=["-S"], PYTHONPATH=str(site))
    command = "with a C++ compiler on PATH run: pip install --no-cache-dir --force-reinstall"
    assert f"{command} --no-deps recurx\n" in python(asked, **isolated)
    record = next(site.glob("*.dist-info")) / "direct_url.json"
    record.write_text('{"url": "https://host.example/r", "vcs_info": {"vcs": "git"}}')
    assert f"{command} --no-deps git+https://host.example/r\n" in python(asked, **isolated)


def test_a_wheel_holds_no_module_that_was_deleted_since_the_last_build(tmp_path):
    checkout = copy_checkout(tmp_path / "checkout")
    (checkout / "recurx" / "gone.py").touch()
    first = unpacked_wheel(checkout, "wheel", RECURX_NATIVE="0")
    assert (first / "recurx" / "gone.py").exists()
    (checkout / "recurx" / "gone.py").unlink()
    shutil.rmtree(checkout / "dist")
    again = unpacked_wheel(checkout, "wheel", RECURX_NATIVE="0")
    assert not (again / "recurx" / "gone.py").exists()


def test_the_build_does_not_warn_and_the_readme_points_at_nothing_relative(checkout):
    out = checkout / "dist" / "quiet"
    out.mkdir(parents=True)
    source = f"import setuptools.build_meta as b; b.build_wheel({str(out)!r})"
    done = run(sys.executable, "-c", source, cwd=checkout, RECURX_NATIVE="0")
    words = done.stdout + done.stderr
    assert "is absent from the `packages`" not in words and "Warning" not in words, words
    metadata = next(checkout.glob("recurx.egg-info/PKG-INFO")).read_text()
    assert "# recurx" in metadata
    assert not re.search(r"\]\((?![a-z]+:|#)", metadata)
