"""Two ranks (gloo, started by torchrun) train as one rank with the whole batch does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_ranks_are_one() -> None:
    """`auto`: the calls before the window run on the engine that is here."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*command, "-m", "tests.train.ddp_worker", "auto"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "ranks agree" in done.stdout, done.stdout + done.stderr
    # One that lives on aborts the process now and then, when it wants the interpreter's lock.
    assert done.stdout.count("threads of gloo at the end: []") == 2, done.stdout
