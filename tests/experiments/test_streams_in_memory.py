"""`--out FILE` of solve and eval: memory grows neither with the file nor with the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import recurx
from recurx import tasks
from recurx.experiments.answering import boards_out

ROOT = Path(recurx.__file__).parents[1]
FEW_MB = 5.0
# The command on one file and then another, in one process: the peak of its memory after each. Peaks
# of two processes differ by megabytes that no file is to blame for.
RUN = """
import json, sys
from recurx.experiments.answering import {module} as module
from recurx.commands import main
for planted, words in zip(("", {planted!r}), json.loads(sys.argv[1])):
    exec(planted)
    assert main(words) == 0
    status = open("/proc/self/status").read()  # not getrusage, which starts at the parent's peak
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
"""
# Keeps what was said of every puzzle that was answered.
PLANTED = "kept = []; lines = module.lines_of\n" \
          "module.lines_of = lambda *a: kept.append((lines(*a), a)) or kept[-1][0]"  # fmt: skip


def growth(
    net: str, folder: Path, command: str, counts: tuple[int, int], planted: str = ""
) -> float:
    """MB by which a run over the second count of puzzles exceeds the peak of one over the first."""
    boards = tasks.get("sudoku-6x6").generate(np.random.default_rng(0), 200).inputs - 1
    lines = ["".join(map(str, board)) + "\n" for board in boards.tolist()]
    runs = []
    for count in counts:
        puzzles = folder / f"puzzles-{count}.txt"
        puzzles.write_text("".join(lines) * (count // len(lines)))
        out = folder / f"{command}-{count}-{bool(planted)}.jsonl"
        runs.append([command, *["--puzzles"] * (command == "eval"), str(puzzles)])
        runs[-1] += ["--checkpoint", net, "--out", str(out), "--max-steps", "2", "--halt", "none"]
        runs[-1] += ["--batch-size", "64"]
    module = "boards_out" if command == "solve" else "evaluate"
    # What measuring takes differs from run to run.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                   "RECURX_AUTOTUNE": "0", "RECURX_CACHE": "0"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(module=module, planted=planted), json.dumps(runs)],
        capture_output=True, text=True, env=environment, timeout=500, check=True,
    )  # fmt: skip
    first, second = (
        float(line) for line in done.stdout.split("\n") if line.replace(".", "").isdigit()
    )
    return second - first


@pytest.mark.slow
@pytest.mark.parametrize("command", ["solve", "eval"])
def test_memory_does_not_grow_with_the_file(command: str, untrained_6x6: str, tmp_path) -> None:
    assert growth(untrained_6x6, tmp_path, command, (1000, 4000)) < FEW_MB
    if command == "solve":  # the same limit sees a run that forgets nothing
        assert growth(untrained_6x6, tmp_path, command, (1000, 8000), planted=PLANTED) > FEW_MB


def test_a_large_batch_is_refined_in_parts(untrained_6x6: str, tmp_path, monkeypatch) -> None:
    model = recurx.load_checkpoint(untrained_6x6).build()
    state = 4 * model.inner.empty_carry(1)["z_H"].numel()
    most = boards_out.together(model, 10**6)
    assert boards_out.STATE_BYTES / 2 < most * state <= boards_out.STATE_BYTES
    assert boards_out.together(model, 5) == 5
    monkeypatch.setattr(boards_out, "STATE_BYTES", 0)
    assert 16 <= boards_out.together(model, 10**6) <= 16 * torch.get_num_threads()
