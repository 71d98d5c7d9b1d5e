"""Clipping, parts of a batch, Muon: the step that a plain loop takes, resumable to the bit."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from recurx.commands import main
from recurx.errors import InvalidArgument
from recurx.models import ACTLossHead
from recurx.models.exploration import Exploration
from recurx.models.puzzle_embedding import PuzzleEmbedding
from recurx.train import (
    AdamATan2,
    CapturedStep,
    Muon,
    SampleQueue,
    Trainer,
    open_data,
    optim,
    swap,
)  # fmt: skip
from recurx.train.captured import tensors_of
from recurx.train.ranks import Ranks
from tests.train.guards import HostSync, Tape, formula_alone, no_host_sync
from tests.train.test_ranks import (
    ROOT,
    assert_same_run,
    config,
    in_threads,
    made,
    steps_and_state,
)  # fmt: skip
from tests.train.test_train import TASK, differing, tiny

needs_muon = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9"
)
OPTIONS = {
    "clipping": {"clip_grad_norm": 0.05},
    "parts": {"accumulate": 3},
    "muon": {"optimizer": "muon"},
    "all": {"clip_grad_norm": 0.05, "accumulate": 2, "optimizer": "muon"},
}
KINDS = [
    pytest.param(name, marks=needs_muon if name in ("muon", "all") else ()) for name in OPTIONS
]


# ---- each is what a plain loop does --------------------------------------------------------------


def gradients_seen(trainer: Trainer) -> list[list[Tensor]]:
    """The gradients of each step, as they come and as the optimisers get them."""
    seen: list[list[Tensor]] = []

    def note(grads: list[Tensor]) -> None:
        seen.append([grad.clone() for grad in grads])

    trainer.one_step.synchronize = note
    return seen


def test_clipping_is_that_of_pytorch() -> None:
    """On the gradients of each step, by hand, with the optimiser on a copy of the weights."""
    limit = 0.05
    run = Trainer(tiny(clip_grad_norm=limit))
    twins = [nn.Parameter(p.detach().clone()) for p in run.model.parameters()]
    by_hand = AdamATan2(twins, lr=0.0, betas=(0.9, 0.95), weight_decay=run.config.weight_decay)
    raw, norms = gradients_seen(run), []
    for step in range(5):
        run.train_step()
        for twin, grad in zip(twins, raw[-1], strict=True):
            twin.grad = grad.clone()
        norms.append(float(torch.nn.utils.clip_grad_norm_(twins, limit)))
        by_hand.param_groups[0]["lr"] = run.config.lr * min(1.0, (step + 1) / run.config.warmup)
        by_hand.step()
        for twin, param in zip(twins, run.model.parameters(), strict=True):
            assert torch.equal(twin.grad, param.grad)
            torch.testing.assert_close(twin, param, rtol=1e-6, atol=1e-7)
    assert min(norms) > limit  # it did clip
    for grads, twin in zip(zip(*raw, strict=True), twins, strict=True):
        assert not torch.equal(grads[-1], twin.grad)


def test_what_is_below_the_norm_stays() -> None:
    loose, none = Trainer(tiny(clip_grad_norm=1e6)), Trainer(tiny())
    for _ in range(4):
        loose.train_step()
        none.train_step()
    assert differing(loose, none) == []


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("variant", ["trm", "hrm"])
def test_parts_of_a_batch_are_the_step_of_the_whole(parts: int, variant: str) -> None:
    """Halting, exploration, samples and puzzle rows are equal, sums up to their order."""
    model = {"variant": variant, "H_layers": int(variant == "hrm"), "puzzle_emb_ndim": 16}
    model["no_ACT_continue"] = variant != "hrm"
    sums, state = steps_and_state(puzzled(config(model=model, clip_grad_norm=0.1)))
    some = puzzled(config(model=model, clip_grad_norm=0.1, accumulate=parts))
    other_sums, other_state = steps_and_state(some)
    assert_same_run(other_state, state)
    for got, want in zip(other_sums, sums, strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-4)
    assert sum(step["count"] for step in sums) > 30  # slots were replaced all the time


def test_ranks_and_parts_together_are_the_step_of_the_whole() -> None:
    alone = steps_and_state(made(config()))[1]
    others = in_threads(2, lambda ranks: made(config(accumulate=3), ranks=ranks), steps_and_state)
    for _, state in others:
        assert_same_run(state, alone)


def puzzled(settings, **arguments) -> Trainer:
    """A run on five puzzles, whose rows of the embedding differ."""
    data = open_data(settings)
    draw, data.num_puzzle_identifiers = data.draw, 5

    def numbered(count: int) -> dict[str, Tensor]:
        drawn = draw(count)
        return {**drawn, "puzzle_identifiers": (drawn["inputs"].sum(1) % 5).int()}

    data.draw = numbered
    return made(settings, data=data, **arguments)


def _forget_the_slots(monkeypatch) -> None:
    halt = Exploration.halt

    def alike(self: Exploration, *arguments: object) -> Tensor:
        self.first_slot = 0
        return halt(self, *arguments)

    monkeypatch.setattr(Exploration, "halt", alike)


def _forget_the_rows(monkeypatch) -> None:
    monkeypatch.setattr(PuzzleEmbedding, "first_row", property(lambda s: 0, lambda s, v: None),
                        raising=False)  # fmt: skip


def _draw_anew(monkeypatch) -> None:
    halt = Exploration.halt

    def more(self: Exploration, *arguments: object) -> Tensor:
        if self.first_slot:
            self.state[1:].add_(1)
        halted = halt(self, *arguments)
        return halted

    monkeypatch.setattr(Exploration, "halt", more)


def _last_part_alone(monkeypatch) -> None:
    backward = Tensor.backward

    def alone(self: Tensor, *arguments: object, **keywords: object) -> None:
        for weight in WEIGHTS:
            weight.grad = None if weight.grad is None else weight.grad.zero_()
        backward(self, *arguments, **keywords)

    monkeypatch.setattr(Tensor, "backward", alone)


WEIGHTS: list[Tensor] = []
BUGS = {
    "slots explore alike": _forget_the_slots,
    "parts draw anew": _draw_anew,
    "rows are written over": _forget_the_rows,
    "the last part alone": _last_part_alone,
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_comparison_notices_a_planted_bug(bug: str, monkeypatch) -> None:
    settings = {"model": {"puzzle_emb_ndim": 16}, "optimizer": "adamw"}
    state = steps_and_state(puzzled(config(**settings)))[1]
    some = puzzled(config(**settings, accumulate=3))
    WEIGHTS[:] = some.model.parameters()
    BUGS[bug](monkeypatch)
    with pytest.raises(AssertionError):
        assert_same_run(steps_and_state(some)[1], state)


@needs_muon
def test_muon_is_that_of_pytorch() -> None:
    """Matrices of all shapes, a schedule, decay; the run's own groups beside AdamW by hand."""
    run = Trainer(tiny(optimizer="muon", weight_decay=0.1))
    named = dict(run.model.named_parameters())
    inner = [name for name in named if "_level.layers." in name]
    assert len(inner) == 4 and all(named[name].ndim == 2 for name in inner)
    twins = {name: nn.Parameter(p.detach().clone()) for name, p in named.items()}
    rest = [twin for name, twin in twins.items() if name not in inner]
    how = {"lr": run.config.lr, "weight_decay": 0.1}
    by_hand = [
        torch.optim.Muon([twins[n] for n in inner], **how, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, **how, betas=(0.9, 0.95)),
    ]
    for step in range(6):
        run.train_step()
        for optimizer in by_hand:
            optimizer.param_groups[0]["lr"] = run.config.lr * min(1, (step + 1) / run.config.warmup)
        for name, twin in twins.items():
            twin.grad = named[name].grad.clone()
        for optimizer in by_hand:
            optimizer.step()
        for name, twin in twins.items():
            torch.testing.assert_close(named[name], twin, rtol=2e-6, atol=2e-7)
    assert {
        id(p) for o in run.one_step.optimizers for g in o.param_groups for p in g["params"]
    } == {id(p) for p in named.values()}


@needs_muon
@pytest.mark.parametrize(("settings", "dtype"), [
    ({}, torch.float32), ({}, torch.bfloat16),
    ({"nesterov": False, "momentum": 0.8}, torch.float32),
    ({"adjust_lr_fn": "match_rms_adamw"}, torch.float32),
    ({"adjust_lr_fn": "original", "ns_steps": 3, "weight_decay": 0.0}, torch.float32),
], ids=str)  # fmt: skip
def test_every_setting_of_muon_means_the_same(settings: dict, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    start = [torch.randn(shape).to(dtype) for shape in ((5, 9), (9, 5), (7, 7), (1, 6), (64, 16))]
    kinds = [(Muon, 0.1), (torch.optim.Muon, 0.1), (torch.optim.Muon, 0.11)]
    weights = [[nn.Parameter(w.clone()) for w in start] for _ in kinds]
    made = [kind(some, lr=lr, **settings) for (kind, lr), some in zip(kinds, weights, strict=True)]
    for _ in range(5):
        for same in zip(*weights, strict=True):
            grad = torch.randn_like(same[0])
            for weight in same:
                weight.grad = grad.clone()
        for optimizer in made:
            optimizer.step()
    unit = 2.0**-23 if dtype == torch.float32 else 2.0**-8
    for ours, theirs, planted in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=4 * unit, atol=4 * unit)
        assert not torch.allclose(ours, planted, rtol=4 * unit, atol=4 * unit)
    groups = [optimizer.state_dict()["param_groups"] for optimizer in made]
    assert groups[0] == groups[1]


def test_an_older_pytorch_says_that_it_has_no_muon(monkeypatch) -> None:
    monkeypatch.setattr(optim, "TORCH_MUON", None)
    with pytest.raises(InvalidArgument, match=r"2\.9 or newer.*torch\.optim\.Muon"):
        Trainer(tiny(optimizer="muon"))


SHARDED = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from recurx.train import CapturedStep, SampleQueue, Trainer
from tests.train.test_train import tiny
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for shards in (False, True):
    run = Trainer(tiny(), backend="eager")
    head = run.one_step.head
    if shards:
        fully_shard(head, mesh=init_device_mesh("cpu", (1,)))
    adamw = torch.optim.AdamW(head.parameters(), lr=1e-3)
    step = CapturedStep(head, [adamw], SampleQueue(run.data.draw, 6), clip_grad_norm=0.05)
    for _ in range(4):
        step()
    print(type(next(head.parameters())).__name__, step.diverged(), step.metrics()["loss"])
dist.destroy_process_group()
"""


def test_sharded_weights_are_clipped_and_looked_at_too() -> None:
    """FSDP2 on one rank, in a process of its own: norms are DTensors there."""
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    plain, sharded = (line.split() for line in done.stdout.splitlines())
    assert (plain[0], sharded[0]) == ("Parameter", "DTensor") and plain[1:] == sharded[1:]


# ---- fixed addresses, no host, resumable ---------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_a_replayed_step_is_the_uncaptured_one_to_the_bit(name: str, monkeypatch) -> None:
    formula_alone(monkeypatch)
    settings = {**OPTIONS[name], "model": {"puzzle_emb_ndim": 16}}
    settings |= {"loss": "fused_stablemax_cross_entropy"}
    plain, replayed = Trainer(tiny(**settings)), Trainer(tiny(**settings))
    if "optimizer" in settings:  # what a GPU's has
        for run in (plain, replayed):
            run.optimizer.param_groups[0]["capturable"] = True
            run.one_step.optimizers[0] = AdamATan2(run.optimizer.param_groups[0]["params"])
            run.one_step._rates = [torch.tensor(1e-3)] * 3
            for group in run.one_step._groups():
                group["lr"] = torch.tensor(1e-3)
    replayed.one_step.capturer = Tape()
    for step in range(8):
        assert plain.train_step().sums == replayed.train_step().sums, step
        pairs = zip(*(run.one_step.static_tensors() for run in (plain, replayed)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), step
    addresses = [t.data_ptr() for t in plain.one_step.static_tensors()]
    plain.queue.refill()
    with no_host_sync():
        plain.one_step._step()
    assert [t.data_ptr() for t in plain.one_step.static_tensors()] == addresses


@needs_muon
def test_the_guard_sees_what_muon_of_pytorch_reads_and_swap_mends_it() -> None:
    def step_of(optimizer: torch.optim.Optimizer, run: Trainer, **how: object) -> CapturedStep:
        return CapturedStep(run.one_step.head, [optimizer], run.queue, **how)

    run = Trainer(tiny(loss="fused_stablemax_cross_entropy"))
    hidden = [p for n, p in run.model.named_parameters() if "_level.layers." in n]
    theirs = torch.optim.Muon(hidden, lr=0.1)
    plain = step_of(theirs, run)
    plain()
    with pytest.raises(HostSync), no_host_sync():
        plain._step()
    with pytest.raises(InvalidArgument, match=r"recurx\.train\.Muon.*swap"):
        step_of(theirs, run, capture=Tape())
    handle = swap(theirs)
    assert "Muon" in str(handle.report)
    swapped = step_of(theirs, run, capture=Tape())
    swapped()
    with no_host_sync():
        swapped._step()
    handle.remove()
    with pytest.raises(InvalidArgument, match="swap"):
        step_of(theirs, run, capture=Tape())


@pytest.mark.parametrize("name", KINDS)
def test_interrupted_and_resumed_is_the_undisturbed_run_to_the_bit(tmp_path, name: str) -> None:
    settings = tiny(**OPTIONS[name], model={"puzzle_emb_ndim": 16})
    whole = Trainer(settings)
    for _ in range(9):
        whole.train_step()
    Trainer(settings, tmp_path).run(steps=4)
    resumed = Trainer.resume(tmp_path)
    assert resumed.config == settings
    resumed.run(steps=9)
    assert differing(resumed, whole) == []
    again = Trainer.resume(tmp_path)
    for optimizer in again.one_step.optimizers[: 2 if "optimizer" in OPTIONS[name] else 1]:
        assert optimizer.state
        optimizer.state.clear()  # planted: each of them is part of the state
        again.train_step()
        whole.train_step()
        assert differing(again, whole)


@needs_muon
def test_the_command_has_the_options_and_keeps_them(tmp_path, capsys) -> None:
    folder, small = str(tmp_path / "run"), ["--set=hidden_size=16", "--set=num_heads=2"]
    fresh = ["train", TASK, *small, "--batch-size", "4", "--eval-count", "8", "--out", folder]
    asked = ["--accumulate", "2", "--clip-grad-norm", "0.5", "--optimizer", "muon"]
    assert main([*fresh, *asked, "--steps", "2"]) == 0
    assert main(["train", "--resume", folder, "--steps", "3"]) == 0
    kept = Trainer.resume(folder).config
    assert (kept.accumulate, kept.clip_grad_norm, kept.optimizer) == (2, 0.5, "muon")
    capsys.readouterr()
    fresh[-1] = str(tmp_path / "other")
    for wrong, says in (
        (["--accumulate", "3"], "a divisor of the batch of 4"),
        (["--clip-grad-norm", "-1"], "clip_grad_norm"),
        (["--resume", folder, "--accumulate", "4"], "leave out --accumulate"),
    ):
        assert main((fresh if "--resume" not in wrong else fresh[:1]) + wrong) == 2
        assert says in capsys.readouterr().err


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"batch_size": 6, "accumulate": 4}, "a divisor of the batch of 6"),
        ({"accumulate": 0}, "accumulate"),
        ({"clip_grad_norm": -1.0}, "clip_grad_norm"),
        ({"clip_grad_norm": math.nan}, "clip_grad_norm"),
        ({"optimizer": "lion"}, "muon"),
    ],
)
def test_bad_options_are_refused(arguments: dict, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        tiny(**arguments)


def test_parts_that_a_rank_cannot_have_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="a divisor of the 3 slots of a rank"):
        Trainer(tiny(batch_size=6, accumulate=2), ranks=Ranks(2, 0))


def test_a_foreign_embedding_that_knows_of_no_parts_is_refused() -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("local_ids", torch.zeros(6, dtype=torch.int32))

    head = ACTLossHead(Trainer(tiny()).model)
    head.puzzle_emb = Foreign()
    queue = SampleQueue(Trainer(tiny()).data.draw, 6)
    with pytest.raises(InvalidArgument, match="1 with Foreign"):
        CapturedStep(head, [], queue, accumulate=2)
    assert len(tensors_of(CapturedStep(head, [], queue).carry)) == 7
