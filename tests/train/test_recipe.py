"""Depth that grows, random starts, burn-in, step losses, winner takes all: each by hand."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import recurx
from recurx.commands import main
from recurx.errors import InvalidArgument
from recurx.models import softmax_cross_entropy, stablemax_cross_entropy
from recurx.solving.noise import truncated_normals
from recurx.train import TrainConfig, Trainer, recipe
from recurx.train.nested import mapped
from tests.train.guards import Tape, formula_alone, no_host_sync
from tests.train.test_ranks import assert_same_run, config, in_threads, made, steps_and_state
from tests.train.test_train import TASK, differing, tiny

OPTIONS = {
    "depths": {"depths": "1x1:3,2x1x2:6"},
    "starts": {"random_starts": True},
    "burn-in": {"burn_in": 4},
    "last": {"step_loss": "last"},
    "decay": {"step_loss": "0.7"},
    "tries": {"random_starts": True, "tries": 3},
    "all": {"depths": "1x1:3", "random_starts": True, "tries": 2, "accumulate": 3,
            "step_loss": "0.7", "model": {"feedback": "softmax"}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def every_step_burns_in(monkeypatch) -> None:
    monkeypatch.setattr(recipe, "BURN_IN_SHARE", 0.7)


# ---- what holds for each of them ----------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_interrupted_and_resumed_is_the_undisturbed_run_to_the_bit(tmp_path, name: str) -> None:
    settings = tiny(**OPTIONS[name])
    whole, plain = made(settings), made(tiny())
    for run in (whole, plain):
        for _ in range(8):
            run.train_step()
    assert any("average" in changed for changed in differing_or_shapes(whole, plain))  # it does act
    first = made(settings, folder=tmp_path)
    first.run(steps=4)
    resumed = Trainer.resume(tmp_path)
    assert resumed.config == settings
    resumed.run(steps=8)
    assert differing(resumed, whole) == []


def differing_or_shapes(one: Trainer, other: Trainer) -> list[str]:
    if one.config.model != other.config.model:
        return ["average, since the model is another"]
    return differing(one, other)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "burn-in"])
def test_a_replayed_step_is_the_uncaptured_one_to_the_bit(name: str, monkeypatch) -> None:
    formula_alone(monkeypatch)
    settings = tiny(**OPTIONS[name], loss="fused_stablemax_cross_entropy")
    plain, replayed = made(settings), made(settings)
    replayed.one_step.capturer = Tape()
    for step in range(12):
        assert plain.train_step().sums == replayed.train_step().sums, step
        pairs = zip(*(run.one_step.static_tensors() for run in (plain, replayed)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), step
    assert replayed.one_step.captured
    plain.queue.refill()
    with no_host_sync():
        plain.one_step._step()


@pytest.mark.parametrize("name", ["starts", "tries"])
def test_ranks_and_parts_are_the_run_of_one(name: str) -> None:
    alone = steps_and_state(made(config(**OPTIONS[name])))[1]
    parts = steps_and_state(made(config(**OPTIONS[name], accumulate=2)))[1]
    others = in_threads(2, lambda ranks: made(config(**OPTIONS[name]), ranks=ranks),
                        steps_and_state)  # fmt: skip
    for state in (parts, *(state for _, state in others)):
        assert_same_run(state, alone)


# ---- depth ---------------------------------------------------------------------------------------


def test_depth_grows_and_ends_at_the_model_s_own(tmp_path) -> None:
    run, shallow = (
        made(tiny(depths="1x1:2,1x2x2:4"), folder=tmp_path),
        made(tiny(model={"H_cycles": 1, "L_cycles": 1})),
    )
    own, seen = run.model.config, []
    assert (own.H_cycles, own.L_cycles, own.halt_max_steps) == (1, 2, 3)
    for _ in range(6):
        run.train_step()
        seen.append((len(run.model.inner.schedule), run.model.config.halt_max_steps))
        assert run.averaged().config == own and run.averaged().inner.schedule == own.schedule
        if len(seen) < 3:
            shallow.train_step()
        if len(seen) == 2:  # one call less a cycle is all that differs
            assert differing(run, shallow) == []
            run.save()
            assert recurx.load_checkpoint(tmp_path / "model.safetensors").config == own
    assert seen == [(2, 3)] * 2 + [(3, 2)] * 2 + [(3, 3)] * 2
    assert run.carry.steps.max() <= 3


# ---- beginnings ----------------------------------------------------------------------------------


def entering(run: Trainer) -> list:
    """The carry that enters each call of the model from now on, cloned."""
    seen: list = []
    call = run.model.forward

    def noted(carry, batch, **how):
        seen.append((mapped(Tensor.clone, carry), how))
        return call(carry, batch, **how)

    run.model.forward = noted
    return seen


def test_fresh_samples_start_at_states_of_their_own() -> None:
    run = made(tiny(random_starts=True, batch_size=6))
    seen = entering(run)
    starts = []
    for step in range(5):
        fresh = run.carry.halted.clone()
        run.train_step()
        carry = seen[-1][0]
        assert not carry.halted.any() and not carry.steps[fresh].any()
        for which, name in enumerate(("z_H", "z_L")):
            state = carry.inner_carry[name]
            numbers = 2 * (step * 6 + torch.arange(6)) + 1
            want = truncated_normals(numbers, which, tuple(state.shape[1:]), run.config.seed)
            torch.testing.assert_close(state[fresh], want[fresh])
            if step:
                assert not torch.allclose(state[~fresh], want[~fresh])
            starts += list(state[fresh])
    values = torch.stack(starts)
    assert len(values) > 20 and len(values.flatten(1).unique(dim=0)) == len(values)
    assert values.mean().abs() < 0.05 and (values.std() - 1).abs() < 0.05
    solved = recurx.solve(run.model, {"inputs": run.carry.current_data["inputs"]}, 1, halt=None)
    assert solved.steps.tolist() == [1] * 6
    start = run.model.inner.H_init
    assert (seen[-1][0].inner_carry["z_H"] == start).all()  # answers start where they did


def test_burn_in_goes_on_without_gradient_and_does_not_count() -> None:
    run = made(tiny(burn_in=4))
    seen, lengths = entering(run), []
    for _ in range(10):
        fresh, before, inner = run.carry.halted.clone(), len(seen), copy.deepcopy(run.model.inner)
        run.train_step()
        *burnt, (entered, how) = seen[before:]
        assert how == {} and all(how == {"training": False} for _, how in burnt)
        assert not entered.steps[fresh].any() and not entered.halted.any()
        data = {key: value[fresh] for key, value in entered.current_data.items()}
        states = inner.initial_states(int(fresh.sum()))
        for _ in burnt:
            states, _, _ = inner(states, data, backend="eager")
        for name, state in states.items():
            torch.testing.assert_close(
                entered.inner_carry[name][fresh], state, rtol=1e-3, atol=1e-3
            )
        lengths.append(len(burnt) if fresh.any() else 0)
    assert {0, 1, 4} <= set(lengths) <= {0, 1, 2, 4}
    run.one_step.capturer = Tape()
    with pytest.raises(InvalidArgument, match="no capture of a burn-in"):
        run.train_step()


# ---- what is trained -----------------------------------------------------------------------------


def gradients(run: Trainer, by_hand) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those of the next step of `run`, and those of `by_hand(token losses, halting losses, carry)`
    on a copy of its model with the same samples."""
    twin, seen = copy.deepcopy(run.model), entering(run)
    run.train_step()
    entered = seen[-1][0]
    carry, outputs = twin(entered, entered.current_data)
    labels = entered.current_data["labels"]
    tokens = softmax_cross_entropy(outputs["logits"], labels).mean(-1)
    solved = (outputs["logits"].argmax(-1) == labels).all(-1)
    q = F.binary_cross_entropy_with_logits(
        outputs["q_halt_logits"], solved.float(), reduction="none"
    )
    loss = by_hand(tokens, q, carry) / len(labels)
    names, weights = zip(*twin.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    want = {n: g for n, g in zip(names, found, strict=True) if g is not None}
    return {name: run.model.get_parameter(name).grad for name in want}, want


def close(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return all(torch.allclose(got[n], g, rtol=1e-3, atol=1e-6) for n, g in want.items())


def last(tokens: Tensor, q: Tensor, carry) -> Tensor:
    return (tokens * carry.halted).sum() + 0.5 * q.sum()


def decayed(tokens: Tensor, q: Tensor, carry) -> Tensor:
    weights = 3 / (1 + 0.7 + 0.49) * torch.tensor([1, 0.7, 0.49])
    return (tokens * weights[carry.steps.long() - 1]).sum() + 0.5 * q.sum()


def winner(tokens: Tensor, q: Tensor, carry) -> Tensor:
    total = torch.zeros(())
    for first in (0, 3):
        best = first + int(tokens[first : first + 3].argmin())
        total = total + 3 * (tokens[best] + 0.5 * q[best])
    return total


def plain(tokens: Tensor, q: Tensor, carry) -> Tensor:
    return tokens.sum() + 0.5 * q.sum()


@pytest.mark.parametrize(
    ("name", "by_hand"), [("last", last), ("decay", decayed), ("tries", winner)]
)
def test_the_gradient_is_that_of_the_weighted_losses(name: str, by_hand) -> None:
    # A q head that says nothing halts no slot, and nothing is drawn.
    model = {"halt_exploration_prob": 0.0}
    run = Trainer(tiny(**OPTIONS[name], loss="softmax_cross_entropy", ema=0.0, model=model))
    run.train_step()
    if name != "tries":
        run.carry.steps += torch.tensor([1, 0, 1, 0, 0, 1])
    got, want = gradients(run, by_hand)
    assert close(got, want) and len(want) > 5
    twin = Trainer(tiny(**OPTIONS[name], loss="softmax_cross_entropy", ema=0.0, model=model))
    twin.train_step()
    if name != "tries":
        twin.carry.steps += torch.tensor([1, 0, 1, 0, 0, 1])
    assert not close(*gradients(twin, plain))  # the comparison bites


def test_the_tries_of_a_sample_hold_it_together_and_halt_as_the_best_does() -> None:
    run = made(tiny(random_starts=True, tries=3, batch_size=12, model={"halt_max_steps": 6}))
    seen, calls = entering(run), []
    forward = run.model.forward

    def noted(carry, batch, **how):
        after, outputs = forward(carry, batch, **how)
        calls.append((after.halted.clone(), outputs["logits"].detach()))
        return after, outputs

    run.model.forward = noted
    differ, taken = 0, []
    for _ in range(12):
        fresh = run.carry.halted.clone()
        run.train_step()
        entered, (wanted, logits) = seen[-1][0], calls[-1]
        labels = entered.current_data["labels"]
        for first in range(0, 12, 3):
            group = slice(first, first + 3)
            assert all((v[group] == v[first]).all() for v in entered.current_data.values())
            assert len(entered.inner_carry["z_H"][group].unique(dim=0)) == 3
            losses = stablemax_cross_entropy(logits[group], labels[group]).sum(-1)
            assert (run.carry.halted[group] == wanted[first + int(losses.argmin())]).all()
            differ += len(wanted[group].unique()) > 1
            if fresh[first]:
                taken.append(tuple(entered.current_data["inputs"][first].tolist()))
    assert differ > 3, "the test needs tries that want different things"
    # No sample is drawn in vain: they are those of the stream, in order.
    assert len(taken) > 8 and taken == [
        tuple(row) for row in drawn_in_order(run.config, len(taken))
    ]


def drawn_in_order(settings: TrainConfig, count: int) -> list[list[int]]:
    queue = Trainer(settings).queue
    queue.refill()
    rows = []
    while len(rows) < count:
        queue.refill()
        taken = queue.take(torch.ones(settings.batch_size, dtype=torch.bool))
        queue.stepped()
        rows += taken["inputs"].tolist()
    return rows[:count]


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"depths": "1x2"}, "depths.*rising"),
        ({"depths": "2x2:9,1x2:5"}, "depths.*rising"),
        ({"depths": "0x2:9"}, "H_cycles.*at least 1"),
        ({"depths": "1x2x0:9"}, "halt_max_steps.*at least 1"),
        ({"depths": "1x1:9", "model": {"grad_window": 3}}, r"with_window.*1\.\.2"),
        ({"step_loss": "first"}, "step_loss.*all, last"),
        ({"step_loss": "0.0"}, "step_loss.*all, last"),
        ({"burn_in": -1}, "burn_in"),
        ({"tries": 2}, "tries.*1 with one start"),
        ({"tries": 0, "random_starts": True}, "tries"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_said(changes: dict, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        tiny(**changes)


def test_groups_of_tries_are_not_cut() -> None:
    for changes in ({"tries": 4}, {"tries": 2, "accumulate": 6}):
        with pytest.raises(InvalidArgument, match="all tries of a sample in a part"):
            Trainer(tiny(random_starts=True, **changes)).train_step()


def test_configurations_of_old_runs_load_and_mean_what_they_did() -> None:
    values = dataclasses.asdict(tiny())
    for name in ("depths", "random_starts", "burn_in", "step_loss", "tries"):
        del values[name]
    assert TrainConfig(**values) == tiny()
    run = Trainer(tiny())
    assert run.one_step.begin is None and run.one_step.head.weigh is None


def test_the_command_has_the_options_and_keeps_them(tmp_path, capsys) -> None:
    folder, small = str(tmp_path / "run"), ["--set=hidden_size=16", "--set=num_heads=2"]
    asked = ["--depths", "1x1:1", "--random-starts", "--burn-in", "2", "--step-loss", "last",
             "--tries", "2"]  # fmt: skip
    fresh = ["train", TASK, *small, "--batch-size", "4", "--eval-count", "8", "--out", folder]
    assert main([*fresh, *asked, "--steps", "2"]) == 0
    assert main(["train", "--resume", folder, "--steps", "3"]) == 0
    kept = Trainer.resume(folder).config
    said = (kept.depths, kept.random_starts, kept.burn_in, kept.step_loss, kept.tries)
    assert said == ("1x1:1", True, 2, "last", 2)
