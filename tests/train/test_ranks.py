"""Ranks that share a batch train as one rank does: in threads, and as processes under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import recurx.experiments.tasks  # noqa: F401
from recurx import atomic
from recurx.errors import InvalidArgument
from recurx.models.exploration import Exploration
from recurx.models.inner import Inner
from recurx.train import TrainConfig, Trainer, optim, preset, state
from recurx.train.ranks import Ranks
from recurx.verdicts import VERDICTS

ROOT = Path(__file__).resolve().parents[2]
TASK = "sort:length=5,values=4"
# Sums in another order leave a sixth of this after ten steps (fp32 through Adam's quotients); the
# mildest planted bug below leaves 10,000 times as much.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
STEPS = 10


def config(**changes) -> TrainConfig:
    model = {"hidden_size": 16, "num_heads": 2, "halt_max_steps": 3, "halt_exploration_prob": 0.5}
    values = {"batch_size": 12, "seed": 1, "warmup": 3, "lr": 1e-3, **changes}
    values["model"] = {**model, **values.pop("model", {})}
    return preset("tiny-mlp", TASK, **values)


class Meeting:
    """Where the threads of one group exchange values."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=60)
        self.said: list = [None] * world

    def all(self, rank: int, value) -> list:
        self.said[rank] = value
        self.barrier.wait()
        every = list(self.said)
        self.barrier.wait()
        return every


HERE = threading.local()


@pytest.fixture(autouse=True)
def sparse_optimisers_meet_in_threads(monkeypatch) -> None:
    monkeypatch.setattr(optim, "all_gather", lambda own, world: HERE.ranks._all_gather(own))


def made(settings: TrainConfig, **arguments) -> Trainer:
    """A run whose samples halt by their q, and so by exploration too, from the first step on."""
    trainer = Trainer(settings, **arguments)
    head = trainer.model.inner.q_head
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(0))
        head.bias.zero_()
    return trainer


class ThreadRanks(Ranks):
    """A rank that is a thread of this process."""

    def __init__(self, meeting: Meeting, world: int, rank: int) -> None:
        super().__init__(world, rank)
        self.meeting = meeting

    def _all_reduce(self, tensor: Tensor) -> None:
        tensor.copy_(torch.stack(self.meeting.all(self.rank, tensor.clone())).sum(0))

    def _all_gather(self, rows: Tensor) -> Tensor:
        return torch.cat(self.meeting.all(self.rank, rows.clone()))

    def agree(self, number: int) -> int:
        return max(self.meeting.all(self.rank, number))

    def first_says(self, value):
        return self.meeting.all(self.rank, value)[0]


def in_threads(world: int, make: Callable[[Ranks], Trainer], work: Callable) -> list:
    """`work(trainer)` in each of `world` threads; what it returned."""
    meeting = Meeting(world)
    # Made one after the other: the weights' start is drawn from the process's generator.
    trainers = [make(ThreadRanks(meeting, world, rank)) for rank in range(world)]
    results: list = [None] * world

    def run(rank: int) -> None:
        HERE.ranks = trainers[rank].ranks
        try:
            results[rank] = work(trainers[rank])
        except BaseException as error:
            results[rank] = error
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in results:
        if isinstance(error, BaseException) and not isinstance(error, threading.BrokenBarrierError):
            raise error
    return results


def whole_state(trainer: Trainer) -> dict[str, Tensor]:
    return state._flatten(trainer._tensors_to_save())


def steps_and_state(trainer: Trainer) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    sums = [trainer.train_step().sums for _ in range(STEPS)]
    return sums, whole_state(trainer)


def assert_same_run(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Integers (samples, halting, counts) are equal; floats within the tolerance."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        if value.is_floating_point():
            torch.testing.assert_close(got[name], value, **TOLERANCE, msg=lambda m, n=name: n + m)
        else:
            assert torch.equal(got[name], value), name


def pair_of_runs(settings: TrainConfig, world: int):
    alone = steps_and_state(made(settings))
    return alone, in_threads(world, lambda ranks: made(settings, ranks=ranks), steps_and_state)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("variant", ["trm", "hrm"])
def test_ranks_train_as_one_does(world: int, variant: str) -> None:
    model = {"variant": variant, "H_layers": int(variant == "hrm"), "puzzle_emb_ndim": 16}
    settings = config(model={**model, "no_ACT_continue": variant != "hrm"})
    (sums, state), others = pair_of_runs(settings, world)
    for other_sums, other_state in others:
        assert_same_run(other_state, state)
        for got, want in zip(other_sums, sums, strict=True):
            assert got == pytest.approx(want, rel=1e-4, abs=1e-4)
    for name, value in others[0][1].items():
        assert torch.equal(others[1][1][name], value), name  # ranks agree to the bit
    assert sum(step["count"] for step in sums) > 30  # slots were replaced all the time


def planted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "gradients of the others":
        monkeypatch.setattr(
            Ranks, "sum_", lambda self, tensors: [t.mul_(self.world) for t in tensors] and None
        )
    elif name == "slots explore alike":
        whole = Exploration.halt

        def without_offset(self: Exploration, *arguments) -> Tensor:
            self.first_slot = 0
            return whole(self, *arguments)

        monkeypatch.setattr(Exploration, "halt", without_offset)
    else:
        monkeypatch.setattr(Ranks, "own", lambda self, slots: slice(0, slots // self.world))


@pytest.mark.parametrize(
    "bug",
    ["gradients of the others", "slots explore alike", "everybody takes the first samples"],
)
def test_the_comparison_notices_a_planted_bug(bug: str, monkeypatch) -> None:
    alone = steps_and_state(made(config()))
    planted(bug, monkeypatch)
    others = in_threads(2, lambda ranks: made(config(), ranks=ranks), steps_and_state)
    with pytest.raises(AssertionError):
        assert_same_run(others[0][1], alone[1])


DRAWING = {
    "noise": {"noise": 0.1},
    "dropout": {"block": "dropout:0.2,drop_path:0.2"},
}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("drawn", DRAWING)
def test_ranks_draw_the_noise_of_their_slots(drawn: str, parts: int) -> None:
    """Neither how many ranks there are nor in how many parts each goes changes what is drawn."""
    alone = steps_and_state(made(config(model=DRAWING[drawn])))
    settings = config(model=DRAWING[drawn], accumulate=parts)
    others = in_threads(2, lambda ranks: made(settings, ranks=ranks), steps_and_state)
    for _, held in others:
        assert_same_run(held, alone[1])


@pytest.mark.parametrize("drawn", DRAWING)
def test_ranks_that_draw_alike_are_noticed(drawn: str, monkeypatch) -> None:
    whole = Inner.forward

    def without_offset(self: Inner, *given, **how):
        self.first_sample = 0
        return whole(self, *given, **how)

    monkeypatch.setattr(Inner, "forward", without_offset)
    with pytest.raises(AssertionError):
        test_ranks_draw_the_noise_of_their_slots(drawn, 1)


def test_a_checkpoint_of_ranks_is_resumed_by_ranks_and_by_one(tmp_path) -> None:
    """Saved by 2, gone on with by 2 (to the bit), by 3 and by 1 (within the tolerance)."""
    alone = made(config())
    alone.run(steps=STEPS)
    whole = in_threads(
        2, lambda ranks: made(config(), ranks=ranks),
        lambda trainer: trainer.run(steps=STEPS) and whole_state(trainer),
    )  # fmt: skip
    reasons = in_threads(
        2, lambda ranks: made(config(), folder=tmp_path, ranks=ranks),
        lambda trainer: trainer.run(steps=6),
    )  # fmt: skip
    assert reasons == ["steps", "steps"]
    saved = (tmp_path / "state.safetensors").read_bytes()
    for world in (2, 3, 1):
        (tmp_path / "state.safetensors").write_bytes(saved)
        again = in_threads(
            world, lambda ranks: Trainer.resume(tmp_path, ranks=ranks),
            lambda trainer: trainer.run(steps=STEPS) and whole_state(trainer),
        )  # fmt: skip
        assert_same_run(again[0], whole_state(alone))
        if world == 2:
            assert all(torch.equal(again[0][name], whole[0][name]) for name in whole[0])


def test_all_ranks_end_together_when_one_wants_to(tmp_path) -> None:
    def work(trainer: Trainer) -> tuple[str, int]:
        ends = trainer.ranks.rank == 1
        return trainer.run(on_step=lambda p: ends and p.step == 4, save_every=2), trainer.step

    ended = in_threads(2, lambda ranks: made(config(), folder=tmp_path, ranks=ranks), work)
    assert ended == [("stopped", 4), ("stopped", 4)]
    assert Trainer.resume(tmp_path).step == 4


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="multiple of the 5 ranks"):
        Trainer(config(), ranks=Ranks(5, 0))


def torchrun(*arguments: str, ends: bool = True) -> tuple[str, str]:
    """What `train` under two ranks wrote to stdout and stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*command, "-m", "recurx", "train", *arguments], cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) == ends, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.mark.slow
def test_the_command_under_torchrun_is_the_command_alone(tmp_path) -> None:
    """Two processes over gloo save at step 6 and go on to 10; one process never stopped."""
    settings = config(batch_size=12, lr=1e-3)
    names = ("hidden_size", "num_heads", "halt_max_steps", "halt_exploration_prob")
    small = [f"--set={name}={settings.model[name]}" for name in names]
    fresh = [TASK, "--out", str(tmp_path / "run"), "--batch-size", "12", "--seed", "1", "--lr",
             "1e-3", "--warmup", "3", *small]  # fmt: skip
    end = ["--eval-every", "5", "--eval-count", "16", "--json"]
    _, said = torchrun(*fresh, "--steps", "6", *end)
    assert "2 ranks share batches of 12" in said and said.count("weights:") == 1
    printed, _ = torchrun("--resume", str(tmp_path / "run"), "--steps", str(STEPS), *end)
    assert json.loads(printed)["step"] == STEPS  # alone on stdout
    _, tensors = state.read(tmp_path / "run" / "state.safetensors")
    alone = Trainer(settings)
    alone.run(steps=STEPS)
    assert_same_run(state._flatten(tensors), whole_state(alone))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10]


@pytest.mark.slow
def test_ranks_of_processes_end_together_without_a_traceback(tmp_path) -> None:
    """Diverged, which both see; and a folder in use, which the first one alone sees."""
    fresh = [TASK, "--set=hidden_size=16", "--set=num_heads=2", "--batch-size", "4",
             "--eval-count", "8", "--out", str(tmp_path)]  # fmt: skip
    _, said = torchrun(*fresh, "--lr", "1e38", "--warmup", "0", ends=False)
    assert said.count("is not finite at step") == 2 and "recurx/commands.py" not in said
    with atomic.locked(tmp_path / "run.lock"):
        _, said = torchrun(*fresh, ends=False)
    assert "is in use by process" in said and "another rank has ended" in said
    assert "recurx/commands.py" not in said


def test_all_ranks_take_what_the_first_one_measured(monkeypatch) -> None:
    def routes(trainer: Trainer) -> dict:
        name = ("cpu", "eager")[trainer.ranks.rank]
        return {"calls of a test": {"chosen": name, "seconds": {}, "calls": 0}}

    pinned = []
    monkeypatch.setattr(Trainer, "_routes", routes)
    monkeypatch.setattr(VERDICTS, "pin", pinned.append)
    in_threads(2, lambda ranks: made(config(), ranks=ranks), lambda trainer: trainer.train_step())
    assert [found["calls of a test"]["chosen"] for found in pinned] == ["cpu", "cpu"]
