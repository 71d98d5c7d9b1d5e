"""Runs the fast tests on the oldest torch that pyproject.toml admits, on a CPU build of it.

    python .ci/lowest_torch.py [workers]

PyPI's torch for Linux on x86-64 is a CUDA build: with its libraries 3 GB, which no test of a CPU is
worth. TORCH_INDEX=https://download.pytorch.org/whl/cpu (or pip's own settings) leads to CPU builds.
Where there is none this says so and succeeds. All else comes from the environment that runs this.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / "build" / "lowest-torch"
DOWNLOAD_SECONDS, TEST_SECONDS = 180, 480
# What depends on torch's version. The Triton kernels need the triton that their torch came with.
TESTS = ["tests/train", "tests/patching", "tests/models", "tests/solving", "tests/backends"]
TESTS += [str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_*.py")]
# Of the build, of texts and of imports: what they find is the same with any torch.
ELSEWHERE = ("test_packaging.py", "test_native_build.py")
ELSEWHERE += ("test_document_names.py", "test_import_graph.py")


def lowest() -> str:
    """The version in pyproject.toml's `torch>=`."""
    found = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found, "pyproject.toml states no lower bound of torch"
    return found.group(1)


def download(version: str) -> Path | None:
    """The wheel of a CPU build for this interpreter; None where no index offers one."""
    HOME.mkdir(parents=True, exist_ok=True)
    name = f"torch=={version}+cpu"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "-d", str(HOME), name]
    if os.environ.get("TORCH_INDEX"):
        command += ["--index-url", os.environ["TORCH_INDEX"]]
    try:
        done = subprocess.run(command, capture_output=True, timeout=DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    wheels = sorted(HOME.glob(f"torch-{version}*.whl"))
    return wheels[0] if done.returncode == 0 and wheels else None


def environment(wheel: Path) -> Path:
    """The interpreter of an environment with that torch, and the rest of the one running now."""
    folder = HOME / wheel.stem
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        install = ["-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
        subprocess.run([python, *install, wheel], check=True)
        site = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        (site / "rest.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return python


def main() -> int:
    workers = sys.argv[1] if len(sys.argv) > 1 else "1"
    version = lowest()
    wheel = download(version)
    if wheel is None:
        print(
            f"lowest torch: not run, pip finds no CPU build torch=={version}+cpu for this Python "
            "(TORCH_INDEX=https://download.pytorch.org/whl/cpu has one)"
        )
        return 0
    python = environment(wheel)
    tests = [name for name in TESTS if Path(name).name not in ELSEWHERE]
    command = [python, "-m", "pytest", "-q", "-n", workers, "--dist", "loadfile"]
    command += ["-p", "no:cacheprovider", "-m", "not slow", *tests]
    try:
        return subprocess.run(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=TEST_SECONDS
        ).returncode
    except subprocess.TimeoutExpired:
        print(f"lowest torch: the tests on torch {version} took over {TEST_SECONDS} s")
        return 1


if __name__ == "__main__":
    sys.exit(main())
