"""What is there: provenance of the result file, and the tools."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from bench.gpu_check.child import NO_GPU
from bench.gpu_check.journal import emit
from bench.gpu_check.phases import ROOT

COMMANDS = {
    "nvidia_smi": ("nvidia-smi", "-q"),
    "nvcc": ("nvcc", "--version"),
    "compute_sanitizer": ("compute-sanitizer", "--version"),
}
PACKAGES = ("torch", "triton", "numpy", "pytest", "pybind11", "ninja", "hypothesis", "safetensors")


def main() -> int:
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no NVIDIA GPU")
        return NO_GPU
    from recurx.bench.provenance import provenance

    facts = provenance("cuda", torch.get_num_threads())
    del facts["command"]
    emit("provenance", **facts)
    emit("tools", **{name: said(*command) for name, command in COMMANDS.items()})
    emit("packages", **{name: version(name) for name in PACKAGES})
    modules = [path.name for path in (ROOT / "recurx").glob("_C*.so")]
    emit("module", carried=importlib.util.find_spec("recurx._C") is not None, files=modules)
    return 0


def said(*command: str) -> list[str]:
    """The lines of a tool that tell a version or a state, and nothing of a serial number."""
    if shutil.which(command[0]) is None:
        return [f"{command[0]}: not found"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    words = ("release", "version", "product name", "sm  ", "power limit", "mig mode", "temp")
    lines = [" ".join(line.split()) for line in (done.stdout + done.stderr).splitlines()]
    return [line for line in lines if any(word in line.lower() for word in words)][:40]


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    os.chdir(Path(ROOT))
    sys.exit(main())
