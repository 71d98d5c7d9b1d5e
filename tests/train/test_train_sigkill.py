"""A training command killed a hundred times and resumed is the one that nobody disturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks warm processes")


def killed(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # One thread, set before torch is imported: an OpenMP pool does not survive a fork.
    return subprocess.run(
        [sys.executable, "-m", "tests.sigkill", str(folder), *arguments],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_hundred_kills_lose_nothing(tmp_path) -> None:
    done = killed(tmp_path, "--kills", "100")
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["kills"] == 100
    assert told["left a part of a file"] >= 15 and told["got further"] >= 15  # kills of all kinds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bug", "says"),
    [
        ("in place", "damaged"),
        ("metrics stay", "the metrics differ"),
        ("queue is drawn anew", "differ"),
    ],
)
def test_the_kills_find_a_planted_bug(tmp_path, bug: str, says: str) -> None:
    done = killed(tmp_path, "--kills", "60", "--plant", bug)  # the first that finds it ends it
    assert done.returncode != 0 and says in done.stderr, done.stdout + done.stderr[-3000:]
