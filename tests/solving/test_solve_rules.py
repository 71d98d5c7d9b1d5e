"""recurx.solve: halting at a fixed point of the answer, and rollouts from starts of their own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import recurx
from recurx.models import TRM
from recurx.solving import noise
from recurx.solving.options import Rules
from recurx.solving.solve import Answers
from tests import official
from tests.solving.test_solve import BATCH, CountRows, fixed_loop, make_batch, make_model

STEPS = 10


@pytest.fixture(scope="module")
def outputs() -> list[dict[str, Tensor]]:
    """Of every step, with nothing halting."""
    return fixed_loop(make_model(), make_batch(), STEPS)


def ends_of(outputs: list[dict[str, Tensor]], halt: str, patience: int) -> list[tuple[int, bool]]:
    """(step, whether it halted by itself) of every row: one row and one step at a time."""
    found = []
    for row in range(BATCH):
        answers = [o["logits"][row].argmax(-1).tolist() for o in outputs]
        end = (STEPS, False)
        for step in range(1, STEPS + 1):
            last = answers[step - 1 - patience : step] if step > patience else []
            settled = bool(last) and all(answer == last[0] for answer in last)
            wants = float(outputs[step - 1]["q_halt_logits"][row]) > 0
            if {"fixed-point": settled, "q": wants, "any": settled or wants}[halt]:
                end = (step, True)
                break
        found.append(end)
    return found


def check(halt: str, patience: int, outputs: list[dict[str, Tensor]]) -> Answers:
    model, expected = make_model(), ends_of(outputs, halt, patience)
    counted = CountRows(model)
    found = recurx.solve(model, make_batch(), STEPS, halt, patience=patience, trace=True)
    assert found.steps.tolist() == [step for step, _ in expected]
    assert found.halted.tolist() == [by_itself for _, by_itself in expected]
    assert sum(counted.rows) == int(found.steps.sum())  # ended rows are not computed again
    for row, (step, _) in enumerate(expected):
        assert torch.equal(found.predictions[row], outputs[step - 1]["logits"][row].argmax(-1))
    return found


@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("halt", ["fixed-point", "any"])
def test_rows_end_where_a_slow_loop_ends_them(halt: str, patience: int, outputs) -> None:
    found = check(halt, patience, outputs)
    assert len(found.steps.unique()) >= 3, "the test needs rows that differ"
    if halt == "fixed-point":
        assert found.steps.min() > patience


BUGS = {
    "patience is one too few": lambda self, wants, unchanged: unchanged >= self.patience - 1,
    "patience is one too many": lambda self, wants, unchanged: unchanged > self.patience,
    "q halts too": lambda self, wants, unchanged: wants | (unchanged >= self.patience),
    "never": lambda self, wants, unchanged: torch.zeros_like(wants),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_halting_bugs_are_found(bug: str, outputs, monkeypatch) -> None:
    monkeypatch.setattr(Rules, "ends", BUGS[bug])
    with pytest.raises(AssertionError):
        check("fixed-point", 2, outputs)


def test_a_change_starts_the_count_again() -> None:
    """a a b b b: two equal answers, a change, and only then three."""

    class Script(torch.nn.Module):
        """An ACT wrapper that answers by the book: step k of row r says SAYS[r][k]."""

        says = torch.tensor([[1, 1, 2, 2, 2, 2], [1, 2, 1, 2, 1, 2], [3, 3, 3, 3, 3, 3]])

        def __init__(self) -> None:
            super().__init__()
            self.inner = TRM(make_model().config).inner
            self.config = self.inner.config

        def initial_carry(self, batch):
            return TRM.initial_carry(self, batch)

        def forward(self, carry, batch):
            at = carry.steps
            carry.steps = at + 1
            said = self.says[batch["inputs"][:, 0].long(), at.long()]
            logits = torch.nn.functional.one_hot(said, 7)[:, None].float()
            q = -torch.ones(len(at))
            return carry, {"logits": logits.expand(-1, 9, -1), "q_halt_logits": q}

    rows = torch.arange(3)[:, None].expand(3, 9).clone()
    found = recurx.solve(Script(), {"inputs": rows}, 6, "fixed-point", patience=2, trace=True)
    assert found.steps.tolist() == [5, 6, 3] and found.halted.tolist() == [True, False, True]
    assert found.trace[:, 0, 0].tolist() == [1, 1, 2, 2, 2, 2]


# ---- rollouts from starts of their own ---------------------------------------------------------


def start_states(**arguments) -> dict[str, Tensor]:
    """The states that enter the first step, [rows, T, D]."""
    model, seen = make_model(), {}

    def note(module, args):
        if not seen:
            seen.update({name: state.clone() for name, state in args[0].items()})

    model.inner.register_forward_pre_hook(note)
    batch = make_batch(arguments.pop("batch", 6))
    recurx.solve(model, batch, max_steps=1, halt=None, **arguments)
    return seen


def test_each_rollout_but_the_first_starts_at_its_own_random_states() -> None:
    states = start_states(rollouts=4, init="random", seed=3)
    learned = make_model().inner.initial_states(6 * 4)
    for name, state in states.items():
        by_rollout = state.view(6, 4, *state.shape[1:])
        assert torch.equal(by_rollout[:, 0], learned[name].view_as(by_rollout)[:, 0])
        flat = by_rollout[:, 1:].flatten(0, 1).flatten(1)
        assert len(flat.unique(dim=0)) == len(flat), "two rollouts start alike"
        assert abs(float(flat.std()) - 1) < 0.03 and abs(float(flat.mean())) < 0.03
        assert float(flat.abs().max()) <= 2.28  # truncated at two deviations of the normal
    z_h, z_l = (states[name].view(6, 4, -1)[:, 1:] for name in ("z_H", "z_L"))
    assert not torch.equal(z_h, z_l)  # a stream a state
    half = start_states(rollouts=4, init="random", init_scale=0.5, seed=3)["z_H"].view(6, 4, -1)
    torch.testing.assert_close(half[:, 1:], 0.5 * z_h)
    assert torch.equal(start_states(init="random")["z_H"], learned["z_H"][:6])  # one: the first


def test_random_starts_follow_from_the_seed_and_not_from_the_batch() -> None:
    arguments = dict(rollouts=3, init="random")
    whole = start_states(**arguments, seed=1)["z_H"]
    assert torch.equal(whole, start_states(**arguments, seed=1)["z_H"])
    assert not torch.equal(whole, start_states(**arguments, seed=2)["z_H"])
    few = start_states(batch=4, **arguments, seed=1)["z_H"]
    assert torch.equal(few, whole[: 4 * 3])
    model, batch = make_model(), make_batch(6)
    later = {key: value[4:] for key, value in batch.items()}
    for change in ({"init": "random"}, {"sigma": 0.4}):
        given = dict(max_steps=4, halt=None, rollouts=3, logits=True, **change)
        together = recurx.solve(model, batch, **given)
        alone = recurx.solve(model, later, first_sample=4, **given)
        assert torch.equal(alone.predictions, together.predictions[4:])
        # another batch size, so another rounding; another stream is off by far more
        torch.testing.assert_close(alone.q, together.q[4:], rtol=0, atol=1e-4)
        elsewhere = recurx.solve(model, later, first_sample=5, **given)
        assert (elsewhere.q - alone.q).abs().max() > 1e-2


def test_random_starts_are_no_noise_numbers_and_bfloat16_takes_them() -> None:
    entries, shape, seed = torch.arange(2), (9, 64), 5
    first = noise.truncated_normals(entries, 0, shape, seed)
    assert not torch.equal(first, noise.truncated_normals(entries, 1, shape, seed))
    share = (first.abs() < 1).float().mean()
    # P(|z| < 1) of that cut normal: 0.6177 by the error function, 0.6827 of a plain one
    sigma = float(noise._SIGMA)
    expected = math.erf(1 / sigma / math.sqrt(2)) / math.erf(math.sqrt(2))
    assert abs(float(share) - expected) < 0.03
    zero = [torch.zeros(1, dtype=torch.int64)] * 4
    used = noise.philox([*zero[:3], torch.ones(1, dtype=torch.int64)], seed)
    assert [int(w) for w in used] != [int(w) for w in noise.philox(zero, seed)]
    model = make_model(forward_dtype="bfloat16")
    found = recurx.solve(model, make_batch(3), 3, rollouts=3, init="random", select="vote")
    assert found.rollout_steps.shape == (3, 3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"halt": "fixed-point"}, "halt='fixed-point'"),
        ({"halt": "any"}, "halt='any'"),
        ({"init": "random", "rollouts": 2}, "init='random'"),
        ({"first_sample": 3, "sigma": 0.1}, "first_sample=3"),
    ],
)
def test_the_cuda_kernel_refuses_what_it_does_not_do(arguments: dict, says: str) -> None:
    with pytest.raises(recurx.BackendUnavailable, match=f"kernel without {says}: leave"):
        recurx.solve(make_model(), make_batch(2), backend="cuda", **arguments)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"patience": 0}, "patience"),
        ({"patience": 1.5}, "patience"),
        ({"halt": "fixed"}, "halt"),
        ({"init": "zeros"}, "init"),
        ({"init_scale": -1.0}, "init_scale"),
        ({"init_scale": float("inf")}, "init_scale"),
        ({"first_sample": -1}, "first_sample"),
    ],
)
def test_bad_rules_are_named(arguments: dict, names: str) -> None:
    with pytest.raises(recurx.InvalidArgument, match=f"`{names}`"):
        recurx.solve(make_model(), make_batch(2), **arguments)


@pytest.mark.parametrize("system", ["trm", "hrm"])
def test_official_carries_take_random_starts_and_fixed_points(system: str) -> None:
    loaded = official.load(system)
    model = loaded["model"](official.config(system, halt_max_steps=16)).eval()
    batch = official.batch()
    found = recurx.solve(model, batch, 6, "fixed-point", rollouts=3, init="random", logits=True)
    assert found.rollout_steps.shape == (len(batch["inputs"]), 3)
