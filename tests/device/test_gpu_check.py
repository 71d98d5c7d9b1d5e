"""bench/gpu_check.sh: clean without a GPU; no phase that fails or hangs stops the next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_check
from bench.gpu_check import Phase

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_exits_cleanly(tmp_path):
    environ = os.environ | {"PY": sys.executable}
    command = [ROOT / "bench" / "gpu_check.sh", tmp_path / "out", "--quick"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "sees no NVIDIA GPU" in done.stdout
    written = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert written["status"] == "no gpu" and "sees no NVIDIA GPU" in written["reason"]


def test_phases_go_on_after_a_failure(tmp_path):
    python = sys.executable
    todo = [
        Phase("fails", [python, "-c", "print('so it goes'); raise SystemExit(3)"], 20),
        Phase("hangs", [python, "-c", "import time; time.sleep(60)"], 1),
        Phase("missing", ["no-such-program-anywhere"], 20),
        Phase("passes", [python, "-c", "print('fine')"], 20),
    ]
    start = time.monotonic()
    seen = []
    results = gpu_check.run_all(
        todo, tmp_path, dict(os.environ), total=60, after=lambda r: seen.append(len(r))
    )
    assert seen == [1, 2, 3, 4], "what is there is written after every phase"
    assert [r.status for r in results] == ["failed", "timeout", "missing", "passed"]
    assert time.monotonic() - start < 30
    assert results[0].last_lines == ["so it goes"]
    log = (tmp_path / "gpu_check.log").read_text()
    assert "===== fails:" in log and "so it goes" in log and "fine" in log


def test_when_all_the_time_is_spent_the_rest_is_not_started(tmp_path):
    todo = [Phase("late", [sys.executable, "-c", "print('ran')"], 20)]
    (result,) = gpu_check.run_all(todo, tmp_path, dict(os.environ), total=1)
    assert result.status == "timeout" and result.last_lines == ["no time was left"]


@pytest.mark.parametrize("quick", [False, True])
def test_the_plan_keeps_within_nine_minutes(quick, tmp_path):
    todo = gpu_check.phases(quick, tmp_path)
    names = [phase.name for phase in todo]
    assert names[:2] == ["build", "conformance"] and names[-1] == "benchmarks"
    assert {"memcheck", "racecheck", "synccheck"} <= set(names)
    assert sum(phase.limit for phase in todo) <= gpu_check.TOTAL < 540


def test_figures_get_all_the_time_that_the_build_leaves(tmp_path):
    todo = gpu_check.phases(False, tmp_path, figures=True)
    assert [phase.name for phase in todo] == ["build", "benchmarks"]
    assert sum(phase.limit for phase in todo) <= gpu_check.TOTAL
    command = todo[-1].command
    assert command[command.index("--suite") + 1] == "gpu"
    assert float(command[command.index("--time-limit") + 1]) < todo[-1].limit
    assert Path(command[command.index("--out") + 1]).parent == tmp_path
