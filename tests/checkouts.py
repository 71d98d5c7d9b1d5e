"""Copies of this checkout with a small csrc/, and what builds and installs them."""

import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Stands in for csrc/*.cpp, so that these tests build in seconds and test the build, not the engine.
MODULE = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__C() {
    PyObject* module = PyModule_Create(&definition);
#ifdef RX_CUDA
    PyModule_AddIntConstant(module, "cuda", 1);
#endif
    return module;
}
"""


def copy_checkout(target):
    unbuilt = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.py")
    for folder in ("recurx", "kernels"):
        shutil.copytree(ROOT / folder, target / folder, ignore=unbuilt)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, target)
    (target / "csrc" / "cpu").mkdir(parents=True)
    for script in ROOT.glob("csrc/*.py"):
        shutil.copy(script, target / "csrc")
    (target / "csrc" / "bindings.cpp").write_text(MODULE)
    return target


def run(*command, cwd, check=True, **environment):
    """Run in a process of its own, with a PATH and variables of our choosing."""
    unset = {"RECURX_NATIVE", "RECURX_CUDA", "RECURX_CUDA_ARCHS", "CXX", "CXXFLAGS", "PYTHONPATH"}
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def python(source, *, cwd, options=(), **environment):
    command = (sys.executable, *options, "-c", textwrap.dedent(source))
    return run(*command, cwd=cwd, **environment).stdout


def unpacked_wheel(checkout, kind, **environment):
    """Build a wheel ("wheel" or "editable") as pip does, and unpack it into a fresh folder."""
    out = checkout / "dist" / f"{kind}-{'-'.join(environment.values()).replace('/', '')}"
    out.mkdir(parents=True)
    build = f"import setuptools.build_meta as b; b.build_{kind}({str(out)!r})"
    run(sys.executable, "-c", build, cwd=checkout, **environment)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return out / "site"


def build(checkout, check=True, **environment):
    script = checkout / "csrc" / "native_build.py"
    done = run(sys.executable, script, cwd=checkout, check=check, **environment)
    return done.returncode, done.stdout + done.stderr


def fake_nvcc(folder, *, compiles):
    """A toolkit whose nvcc is a shell script, behind a second script, as on some machines."""
    for name in ("bin", "include", "lib64", "path"):
        (folder / name).mkdir(parents=True)
    (folder / "include" / "cuda_runtime.h").touch()
    run("ar", "rc", folder / "lib64" / "libcudart_static.a", cwd=folder)
    # It compiles by handing the file to the host compiler, the arguments after the last -c.
    compile_it = 'shift $(($#-4)); exec c++ -fPIC -x c++ "$@"' if compiles else "exit 1"
    (folder / "bin" / "nvcc").write_text(
        f"""#!/bin/sh
        case "$*" in
        *--dryrun*) echo '#$ TOP={folder}/bin/..' >&2 ;;
        *--list-gpu-arch*) echo compute_80; echo compute_90 ;;
        *--version*) echo 'release 13.0, V13.0.88' ;;
        *) {compile_it} ;;
        esac
        """
    )
    (folder / "path" / "nvcc").write_text(f'#!/bin/sh\nexec "{folder}/bin/nvcc" "$@"\n')
    for script in ("bin/nvcc", "path/nvcc"):
        (folder / script).chmod(0o755)
    return folder
