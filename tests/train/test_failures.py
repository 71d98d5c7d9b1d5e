"""What ends a run early: diverged numbers, full disks, a second run in the folder, signals."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from recurx import atomic
from recurx.commands import main
from recurx.errors import RunFailed, SaveFailed
from recurx.train import Trainer, run_folder
from recurx.train import trainer as trainer_module
from tests.train.test_ranks import HERE, config, in_threads
from tests.train.test_train import TASK, differing, tiny

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--set", "hidden_size=16", "--set", "num_heads=2", "--batch-size", "4",
         "--eval-count", "8", "--eval-every", "2"]  # fmt: skip
fcntl = pytest.importorskip("fcntl")


# ---- diverged ------------------------------------------------------------------------------------


def spoil(trainer: Trainer, kind: str, step: int, number: float) -> None:
    """Make the loss, a gradient or a weight of one step `number`."""
    head, done = trainer.one_step.head, [0]
    weight = next(trainer.model.parameters())

    def now() -> bool:
        return done[0] == step

    if kind == "loss":
        loss_fn = head.loss_fn

        def spoiled(*arguments: torch.Tensor) -> torch.Tensor:
            done[0] += 1
            return loss_fn(*arguments) * (number if now() else 1)

        head.loss_fn = spoiled
    elif kind == "gradient":  # with a finite loss

        def hook(grad: torch.Tensor) -> torch.Tensor:
            done[0] += 1
            return torch.full_like(grad, number) if now() else grad

        weight.register_hook(hook)
    else:  # of whatever else writes to weights; no loss has seen it yet
        step_of = trainer.optimizer.step

        def stepped() -> None:
            step_of()
            done[0] += 1
            if now():
                weight.data[0, 0] = number

        trainer.optimizer.step = stepped


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["loss", "gradient", "weight"])
def test_a_diverged_run_ends_with_the_state_of_before(tmp_path, kind: str, number: float) -> None:
    whole = Trainer(tiny())
    whole.run(steps=4)
    run, seen = Trainer(tiny(), tmp_path), []
    spoil(run, kind, 6, number)
    with pytest.raises(RunFailed, match=r"finite at step 6 .*keeps step 4.*clip-grad-norm") as told:
        run.run(steps=20, save_every=2, on_step=lambda progress: seen.append(progress.loss))
    assert "nan" not in str(told.value) or kind == "weight"  # the last finite loss
    assert len(seen) == (6 if kind == "weight" else 5)  # nobody is shown the bad step
    assert differing(Trainer.resume(tmp_path), whole) == []
    with pytest.raises(RunFailed, match="not finite"):  # nor does a save by hand replace it
        run.save()
    assert Trainer.resume(tmp_path).step == 4


def test_who_wants_it_goes_on(tmp_path) -> None:
    run = Trainer(tiny(), tmp_path, keep_going=True)
    spoil(run, "loss", 3, float("nan"))
    assert run.run(steps=6, save_every=2) == "steps" and run.one_step.diverged() is not None
    assert Trainer.resume(tmp_path).step == 6


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_ranks_end_together_when_one_diverges(tmp_path, kind: str) -> None:
    """Only the last rank has bad numbers; nobody is left waiting for another."""

    def work(trainer: Trainer) -> tuple[int, str]:
        if trainer.ranks.rank == 1:
            spoil(trainer, kind, 3, float("nan"))
        with pytest.raises(RunFailed) as told:
            trainer.run(steps=9, save_every=2)
        return trainer.step, str(told.value)

    ended = in_threads(2, lambda ranks: Trainer(config(), tmp_path, ranks=ranks), work)
    assert [step for step, _ in ended] == [3, 3] and all("step 3" in text for _, text in ended)
    assert Trainer.resume(tmp_path).step == 2


def test_a_diverged_command_is_one_line_and_exit_code_one(tmp_path, capsys) -> None:
    wild = ["train", TASK, *SMALL, "--lr", "1e38", "--warmup", "0", "--save-every", "1"]
    assert main([*wild, "--steps", "9", "--out", str(tmp_path / "a")]) == 1
    error = capsys.readouterr().err
    assert "is not finite at step" in error and "--keep-going" in error and error.count("\n") == 1
    assert main([*wild, "--steps", "3", "--out", str(tmp_path / "b"), "--keep-going"]) == 0
    assert Trainer.resume(tmp_path / "b").step == 3


# ---- saves that fail -----------------------------------------------------------------------------

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EROFS)


def fail_at(monkeypatch, name: str, number: int) -> None:
    def failing(*_: object, **__: object) -> None:
        if name == "save_file":
            raise SafetensorError(f"I/O error: {os.strerror(number)} (os error {number})")
        raise OSError(number, os.strerror(number))

    module = {"save_file": safetensors.torch, "mkdtemp": tempfile}.get(name, os)
    monkeypatch.setattr(module, name, failing)


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["mkdtemp", "save_file", "fsync", "replace"])
def test_a_save_that_fails_keeps_the_last_and_says_why(
    tmp_path, monkeypatch, call: str, number: int
) -> None:
    whole = Trainer(tiny())
    whole.run(steps=5)
    run = Trainer(tiny(), tmp_path)
    run.run(steps=2)
    with monkeypatch.context() as broken, pytest.raises(SaveFailed) as told:
        fail_at(broken, call, number)
        run.run(steps=4)
    text = str(told.value)
    assert f"cannot write {tmp_path / 'state.safetensors'}: {os.strerror(number)}." in text
    room = number not in (errno.EACCES, errno.EROFS)
    assert ("bytes beside the old file" in text and "bytes are free" in text) == room
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "state.safetensors"}
    resumed = Trainer.resume(tmp_path)
    assert resumed.step == 2
    resumed.run(steps=5)
    assert differing(resumed, whole) == []


def test_a_real_limit_ends_the_command_with_code_one(tmp_path) -> None:
    folder = str(tmp_path / "run")
    assert main(["train", TASK, *SMALL, "--steps", "2", "--out", folder]) == 0
    size = (tmp_path / "run" / "state.safetensors").stat().st_size
    goes_on = ["train", "--resume", folder, "--steps", "4"]
    limited = (  # in a process of its own: the limit holds for all that a process writes
        "import resource, sys; from recurx.commands import main; "
        "hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, hard)); "
        f"sys.exit(main({goes_on!r}))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", limited], cwd=ROOT, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    error = ended.stderr
    assert ended.returncode == 1 and "File too large" in error and error.count("\n") == 1, ended
    assert main(goes_on) == 0
    assert Trainer.resume(folder).step == 4


def test_ranks_end_together_when_the_first_cannot_save(tmp_path, monkeypatch) -> None:
    fail_at(monkeypatch, "save_file", errno.ENOSPC)

    def work(trainer: Trainer) -> str:
        with pytest.raises(SaveFailed) as told:
            trainer.run(steps=3)
        return str(told.value)

    first, other = in_threads(2, lambda ranks: Trainer(config(), tmp_path, ranks=ranks), work)
    assert "No space left" in first and "first rank" in other


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_metrics_that_cannot_be_written_end_the_run(tmp_path) -> None:
    run = Trainer(tiny(), tmp_path)
    run.run(steps=1)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(SaveFailed, match=r"metrics.jsonl: No space left"):
        run.log({"loss": 1.0})


# ---- two in one folder ---------------------------------------------------------------------------


def test_a_second_run_in_the_folder_is_told_who_has_it(tmp_path, capsys) -> None:
    folder, refused = tmp_path / "run", []

    def second(progress) -> bool:
        for attempt in (lambda: Trainer.resume(folder), lambda: Trainer(tiny(), folder).run(1),
                        lambda: Trainer(tiny(), folder).log({})):  # fmt: skip
            with pytest.raises(RunFailed, match=f"in use by process {os.getpid()} on "):
                attempt()
            refused.append(progress.step)
        return main(["train", "--resume", str(folder), "--steps", "9"]) != 1

    first = Trainer(tiny(), folder)
    first.save()
    assert first.run(steps=2, on_step=second) == "steps" and len(refused) == 6
    assert "is in use by process" in capsys.readouterr().err
    assert not (folder / run_folder.LOCK_FILE).exists()
    assert Trainer.resume(folder).step == 2


def test_whoever_read_an_older_state_does_not_overwrite_a_newer(tmp_path) -> None:
    """One after the other, so that no lock meets them."""
    Trainer(tiny(), tmp_path).run(steps=2)
    early, late = Trainer.resume(tmp_path), Trainer.resume(tmp_path)
    early.run(steps=5)
    for attempt in (lambda: late.run(steps=3), late.save):
        with pytest.raises(RunFailed, match="another run has saved here"):
            attempt()
    assert differing(Trainer.resume(tmp_path), early) == []


def test_a_folder_that_cannot_be_written_to_can_be_looked_at(tmp_path, monkeypatch) -> None:
    run = Trainer(tiny(), tmp_path)
    run.run(steps=2)

    def refused(*_: object) -> None:
        raise SaveFailed("planted")

    monkeypatch.setattr(atomic, "_lock", refused)
    resumed = Trainer.resume(tmp_path)
    assert differing(resumed, run) == []
    with pytest.raises(SaveFailed, match="planted"):
        resumed.run(steps=3)


def test_the_lock_dies_with_its_process(tmp_path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from recurx import atomic\n"
        "with atomic.locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(99)"
    )
    path = tmp_path / "run.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(RunFailed, match=f"process {holder.pid} on"), atomic.locked(path):
        pass
    holder.kill()
    holder.communicate()
    assert path.exists()  # what it left is no lock
    with atomic.locked(path):
        assert path.read_text().startswith(f"process {os.getpid()} ")
    assert not path.exists()


def test_without_locks_it_warns_and_still_overwrites_nobody(tmp_path, monkeypatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    one, other = Trainer(tiny(), tmp_path), Trainer(tiny(), tmp_path)
    with pytest.warns(UserWarning, match="no locks.*NFS"):
        one.run(steps=2)
    with pytest.warns(UserWarning), pytest.raises(RunFailed, match="another run has saved"):
        other.run(steps=1)
    with pytest.warns(UserWarning):
        assert Trainer.resume(tmp_path).step == 2


def test_two_commands_that_begin_at_once_are_one_run(tmp_path, monkeypatch) -> None:
    """The second looked before the first saved, and would have begun the folder anew."""
    from recurx.experiments.answering import train as command

    folder = tmp_path / "run"
    began = command._started

    def meanwhile(*arguments: object) -> Trainer:
        trainer = began(*arguments)
        Trainer(tiny(), folder).run(steps=3)
        return trainer

    monkeypatch.setattr(command, "_started", meanwhile)
    assert main(["train", TASK, *SMALL, "--steps", "1", "--out", str(folder)]) == 1
    assert Trainer.resume(folder).step == 3


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_a_signal_ends_saves_and_says_so(tmp_path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "recurx", "train", TASK, *SMALL, "--out", str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    while "step      2" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(number)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    assert "Interrupted at step" in printed and "Traceback" not in errors
    resumed = Trainer.resume(folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert resumed.step >= 2 and len(lines) == resumed.step // 2


def test_ranks_agree_on_the_signal(tmp_path, monkeypatch) -> None:
    """torchrun may tell one of them first; threads get none, so here it is planted."""

    @contextlib.contextmanager
    def told_to_one():
        yield [signal.SIGTERM] if HERE.ranks.rank == 1 else []

    monkeypatch.setattr(trainer_module, "interrupts", told_to_one)
    ended = in_threads(
        2, lambda ranks: Trainer(config(), ranks=ranks), lambda run: (run.run(9), run.signal)
    )
    assert ended == [("interrupted", signal.SIGTERM)] * 2
