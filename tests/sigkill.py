"""Kills a training command again and again, resumes it, and compares with one that ran through.

    python -m tests.sigkill FOLDER [--kills 100] [--seed 0] [--plant NAME]

Each command is a fork of this process, which has everything imported, so a start costs no seconds.
A third of the kills come at a random moment, a third within milliseconds after a temporary file of
a save appeared, and a third from inside: at a random one of the calls that a save is made of. Ends
with one line of JSON, or with an AssertionError that says what was lost.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch

import recurx
from recurx.commands import main
from recurx.train import state
from recurx.train.run_folder import METRICS_FILE, MODEL_FILE, STATE_FILE

RUN = ["sort:length=4,values=3", "--batch-size", "4", "--set", "hidden_size=16", "--set",
       "num_heads=2", "--set", "halt_max_steps=3", "--warmup", "3"]  # fmt: skip
EVERY = ["--save-every", "3", "--eval-every", "2", "--eval-count", "8"]
LONGEST = 0.3  # seconds that a command lives at most, beyond its start
CALLS = ("fsync", "replace", "save_file")


def command(folder: Path, steps: int | None) -> list[str]:
    """Go on, or begin where nothing was saved yet."""
    end = [*EVERY, *([] if steps is None else ["--steps", str(steps)])]
    if (folder / STATE_FILE).exists():
        return ["train", "--resume", str(folder), *end]
    return ["train", *RUN, "--out", str(folder), *end]


def fork(folder: Path, steps: int | None = None, dies_at: tuple[str, int, bool] | None = None):
    """The pid of a process that runs the command; it exits by its code."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        if dies_at is not None:
            die_at(*dies_at)
        code = main(command(folder, steps))
    finally:
        os._exit(code)


def die_at(name: str, count: int, before: bool) -> None:
    """Let this process kill itself before or after the `count`th call of one function."""
    left = [count]
    module = safetensors.torch if name == "save_file" else os
    function = getattr(module, name)

    def dying(*arguments, **keywords):
        left[0] -= 1
        if left[0] == 0 and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **keywords)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, dying)


def temporaries(folder: Path) -> set[str]:
    return (
        {name for name in os.listdir(folder) if name.startswith(".")} if folder.exists() else set()
    )


def kill_once(folder: Path, kind: int, rng: random.Random) -> None:
    """Start the command and kill it in one of the three ways."""
    old = temporaries(folder)
    if kind == 0:
        pid = fork(folder)
        time.sleep(rng.uniform(0, LONGEST))
    elif kind == 1:
        pid = fork(folder)
        deadline = time.monotonic() + 10
        while not temporaries(folder) - old:
            assert time.monotonic() < deadline, "no save in ten seconds"
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.01))
    else:
        pid = fork(folder, dies_at=(rng.choice(CALLS), rng.randint(1, 4), rng.random() < 0.5))
        deadline = time.monotonic() + 20
        while not ended(pid):
            assert time.monotonic() < deadline, "the call did not come in twenty seconds"
            time.sleep(0.002)
        return
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), (
        f"the command ended by itself: {os.waitstatus_to_exitcode(status)}"
    )


def ended(pid: int) -> bool:
    found, status = os.waitpid(pid, os.WNOHANG)
    assert not found or os.WIFSIGNALED(status), f"exit code {os.waitstatus_to_exitcode(status)}"
    return found == pid


def check_files(folder: Path) -> tuple[int, int]:
    """Whatever has a file's name is a whole file; the steps that the state and the model tell."""
    step = of_model = 0
    if (folder / STATE_FILE).exists():
        values, tensors = state.read(folder / STATE_FILE)
        step = values["step"]
        assert all(tensor.numel() for tensor in tensors["model"].values())
    if (folder / MODEL_FILE).exists():
        model = recurx.load_checkpoint(folder / MODEL_FILE)
        model.build()
        of_model = model.extra["step"]
    # The state is written first. Who is killed between the two leaves the model of an older save.
    assert of_model <= step, f"the model is of step {of_model}, the state of {step}"
    return step, of_model


def compare(killed: Path, whole: Path) -> None:
    """Bit for bit: weights, optimiser, average, carry, queue, random numbers, metrics."""
    (values, tensors), (expected, wanted) = (state.read(f / STATE_FILE) for f in (killed, whole))
    for each in (values, expected):
        del each["seconds"]
    assert values == expected, "the sampler or the counts differ"
    got, want = state._flatten(tensors), state._flatten(wanted)
    assert got.keys() == want.keys()
    differ = [name for name in want if not torch.equal(got[name], want[name])]
    assert not differ, f"{len(differ)} of {len(want)} tensors of the state differ: {differ[:3]}"
    one, other = (recurx.load_checkpoint(f / MODEL_FILE) for f in (killed, whole))
    assert (one.config, one.extra) == (other.config, other.extra), "the model's metadata differ"
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys()), (
        "the averaged weights differ"
    )
    assert lines(killed) == lines(whole), "the metrics differ"


def lines(folder: Path) -> list[dict]:
    """Metrics without the times, which no two runs share."""
    found = []
    for line in (folder / METRICS_FILE).read_text().splitlines():
        record = json.loads(line)
        del record["seconds"], record["held_out"]["seconds"]
        found.append(record)
    return found


def plant(name: str) -> None:
    """Bugs that the kills must find."""
    if name == "in place":  # half a file under its name, for some milliseconds

        def write(path: Path, values: dict, tensors: dict) -> None:
            with tempfile.TemporaryDirectory() as elsewhere:
                original(Path(elsewhere) / "whole", values, tensors)
                data = (Path(elsewhere) / "whole").read_bytes()
            path.write_bytes(data[: len(data) // 2])
            sign = path.with_name(f".{path.name}.{time.time_ns()}")
            sign.touch()
            time.sleep(0.02)
            path.write_bytes(data)
            sign.unlink()

        original, state.write = state.write, write
    elif name == "metrics stay":
        from recurx.train import run_folder

        run_folder._step_of = lambda line: float("-inf")
    elif name == "queue is drawn anew":
        from recurx.train import SampleQueue

        load = SampleQueue.load
        SampleQueue.load = lambda self, waiting: load(self, {})
    else:
        raise SystemExit(f"no such bug: {name}")


def run(folder: Path, kills: int, seed: int) -> dict:
    rng = random.Random(seed)
    killed, whole = folder / "killed", folder / "whole"
    counts = collections.Counter()
    for number in range(kills):
        before, old = check_files(killed), temporaries(killed)
        kill_once(killed, number % 3, rng)
        counts["left a part of a file"] += bool(temporaries(killed) - old)
        after = check_files(killed)
        lost = any(now < then for now, then in zip(after, before, strict=True))
        assert not lost, f"steps {before} were saved, and are {after} after kill {number}"
        counts["got further"] += after > before
    steps = check_files(killed)[0] + 4
    for where in (killed, whole):
        assert os.waitpid(fork(where, steps), 0)[1] == 0, f"{where} did not reach step {steps}"
    assert not temporaries(killed), temporaries(killed)
    compare(killed, whole)
    return {"kills": kills, "steps": steps, **counts}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plant")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # an OpenMP pool would not survive the forks
    if arguments.plant:
        plant(arguments.plant)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        main(["train", *RUN, "--steps", "3", "--out", str(arguments.folder / "warm"), *EVERY])
    print(json.dumps(run(arguments.folder, arguments.kills, arguments.seed)), flush=True)
