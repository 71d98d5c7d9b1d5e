"""recurx.solve: the fixed loop to the bit, early exit without waste, rollouts, budgets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import recurx
from recurx.models import HRM, TRM, ACTLossHead, HRMConfig, TRMConfig
from tests import official

VOCAB, TOKENS, BATCH = 7, 9, 24


def make_model(cls: type = TRM, **changes) -> TRM | HRM:
    """A tiny random model whose q depends on the sample, so that rows halt at different steps."""
    torch.manual_seed(3)
    config = (HRMConfig if cls is HRM else TRMConfig).tiny(VOCAB, TOKENS)
    model = cls(config, H_cycles=1, L_cycles=1, **changes).eval()
    head = model.inner.q_head
    with torch.no_grad():
        head.weight[0].normal_()
        head.bias.zero_()
        q = torch.stack([o["q_halt_logits"] for o in fixed_loop(model, make_batch(), 8)])
        head.bias[0] = -q.max(dim=0).values.quantile(0.3)  # three rows in ten never halt
    return model


def make_batch(batch: int = BATCH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        "inputs": torch.randint(1, VOCAB, (batch, TOKENS), generator=generator),
        "puzzle_identifiers": torch.zeros(batch, dtype=torch.int32),
    }


@torch.no_grad()
def fixed_loop(model: nn.Module, batch: dict[str, Tensor], steps: int) -> list[dict[str, Tensor]]:
    """The evaluation loop of the official code, with the outputs of every step."""
    carry, outputs = model.initial_carry(batch), []
    for _ in range(steps):
        carry, out = model(carry=carry, batch=batch)
        outputs.append(out)
    return outputs


class CountRows:
    """Counts the rows that reach the inner model."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: list[int] = []
        hook = lambda module, args: self.rows.append(len(args[1]["inputs"]))  # noqa: E731
        model.inner.register_forward_pre_hook(hook)


@pytest.mark.parametrize("cls", [TRM, HRM])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_halting_it_is_the_official_loop_to_the_bit(cls: type, dtype: str) -> None:
    model, batch = make_model(cls, forward_dtype=dtype), make_batch()
    expected = fixed_loop(model, batch, 16)
    answers = recurx.solve(model, batch, halt=None, logits=True, trace=True)
    assert torch.equal(answers.logits, expected[-1]["logits"])
    assert torch.equal(answers.q, expected[-1]["q_halt_logits"])
    assert torch.equal(answers.trace, torch.stack([e["logits"].argmax(-1) for e in expected]))
    assert torch.equal(answers.predictions, answers.trace[-1])
    assert answers.histogram() == {16: BATCH} and not answers.halted.any()
    assert not torch.equal(answers.logits, expected[-2]["logits"])  # one step fewer would show


@pytest.mark.parametrize("cls", [TRM, HRM])
def test_rows_halt_at_their_own_step_and_are_not_computed_again(cls: type) -> None:
    model, batch = make_model(cls), make_batch()
    expected = fixed_loop(model, batch, 8)
    wants = torch.stack([e["q_halt_logits"] for e in expected])
    wants = wants > (0 if cls is TRM else torch.stack([e["q_continue_logits"] for e in expected]))
    first = torch.where(wants.any(0), wants.int().argmax(0) + 1, 8)
    assert len(first.unique()) >= 3 and wants.any(0).any(), "the test needs rows that differ"

    counted = CountRows(model)
    answers = recurx.solve(model, batch, max_steps=8, logits=True)
    assert torch.equal(answers.steps, first)
    assert torch.equal(answers.halted, wants.any(0))
    assert sum(counted.rows) == int(first.sum()) == sum(k * v for k, v in _items(answers))
    rows = torch.arange(BATCH)
    at_halt = torch.stack([e["logits"] for e in expected])[first - 1, rows]
    # The batch shrinks, so kernels may round differently; a wrong step is off by far more.
    torch.testing.assert_close(answers.logits, at_halt, rtol=0, atol=1e-4)
    later = torch.stack([e["logits"] for e in expected])[(first - 2).clamp(min=0), rows]
    changed = first > 1
    assert (answers.logits - later)[changed].abs().amax() > 1e-2


def test_a_higher_bar_for_q_takes_more_steps_and_the_official_one_is_zero() -> None:
    model, batch = make_model(), make_batch()
    q = torch.stack([e["q_halt_logits"] for e in fixed_loop(model, batch, 8)])
    bar = float(q.max(dim=0).values.quantile(0.6))
    wants = q > bar
    first = torch.where(wants.any(0), wants.int().argmax(0) + 1, 8)
    answers = recurx.solve(model, batch, max_steps=8, halt_above=bar)
    assert torch.equal(answers.steps, first)
    assert answers.steps.sum() > recurx.solve(model, batch, max_steps=8).steps.sum()
    assert (recurx.solve(model, batch, max_steps=8, halt_above=-1e9).steps == 1).all()


def _items(answers: recurx.Answers) -> list[tuple[int, int]]:
    assert sum(answers.histogram().values()) == answers.rollout_steps.numel()
    return list(answers.histogram().items())


def test_the_budget_may_exceed_the_steps_of_training() -> None:
    model, batch = make_model(halt_max_steps=4), make_batch()
    longer = make_model(halt_max_steps=32)
    answers = recurx.solve(model, batch, max_steps=11, halt=None, logits=True)
    assert torch.equal(answers.logits, fixed_loop(longer, batch, 11)[-1]["logits"])
    wrapped = fixed_loop(model, batch, 11)[-1]["logits"]  # the wrapper restarts samples at 4
    assert not torch.equal(answers.logits, wrapped)


def test_trace_keeps_the_answer_of_a_halted_row() -> None:
    answers = recurx.solve(make_model(), make_batch(), max_steps=8, trace=True)
    for row, steps in enumerate(answers.steps.tolist()):
        after = answers.trace[steps - 1 :, row]
        assert (after == answers.predictions[row]).all()


def test_rollouts_are_seeded_noisy_and_selected() -> None:
    model, batch = make_model(), make_batch(6)
    plain = recurx.solve(model, batch, max_steps=5, halt=None)
    silent = recurx.solve(model, batch, max_steps=5, halt=None, rollouts=3)
    torch.testing.assert_close(silent.q, plain.q, rtol=0, atol=1e-5)
    assert silent.rollout_steps.shape == (6, 3)

    noisy = {seed: recurx.solve(model, batch, 5, "q", 4, 0.5, seed=seed) for seed in (0, 1)}
    again = recurx.solve(model, batch, 5, "q", 4, 0.5, seed=0)
    assert torch.equal(noisy[0].q, again.q) and torch.equal(noisy[0].predictions, again.predictions)
    assert not torch.equal(noisy[0].q, noisy[1].q)
    assert not torch.equal(noisy[0].q, plain.q)


def test_noise_reaches_the_first_step() -> None:
    model, batch = make_model(), make_batch(3)
    quiet = recurx.solve(model, batch, max_steps=1, halt=None, logits=True)
    noisy = recurx.solve(model, batch, max_steps=1, halt=None, sigma=0.5, logits=True)
    assert not torch.equal(quiet.logits, noisy.logits)


def test_empty_batch_loss_head_mode_and_missing_identifiers() -> None:
    model, batch = make_model(), make_batch()
    empty = recurx.solve(model, make_batch(0))
    assert len(empty) == 0 and empty.histogram() == {}
    model.train()
    model.inner.lm_head.eval()
    answers = recurx.solve(ACTLossHead(model), {"inputs": batch["inputs"]}, max_steps=3)
    assert model.training and model.inner.training and not model.inner.lm_head.training
    assert torch.equal(answers.predictions, recurx.solve(model, batch, max_steps=3).predictions)
    assert not answers.q.requires_grad


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"max_steps": 0}, "max_steps"),
        ({"halt": "never"}, "halt"),
        ({"rollouts": 0}, "rollouts"),
        ({"halt_above": float("nan")}, "halt_above"),
        ({"sigma": -1.0}, "sigma"),
        ({"sigma": float("nan")}, "sigma"),
        ({"select": "best"}, "select"),
        ({"batch": {"inputs": torch.zeros(2, 9)}}, "inputs"),
        ({"batch": {}}, "inputs"),
        ({"model": nn.Linear(2, 2)}, "model"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, names: str) -> None:
    given = {"model": make_model(), "batch": make_batch(), **arguments}
    with pytest.raises(recurx.InvalidArgument, match=names):
        recurx.solve(**given)


@pytest.mark.parametrize("system", ["trm", "single_z", "hier6", "hrm"])
def test_official_models_are_solved_as_they_are(system: str) -> None:
    """The official classes themselves, whose carries are dataclasses: fixed loop and early exit."""
    loaded = official.load(system)
    torch.manual_seed(0)
    model = loaded["model"](official.config(system, halt_max_steps=16)).eval()
    with torch.no_grad():
        model.inner.q_head.weight.normal_()
    batch = official.batch()
    expected = fixed_loop(model, batch, 16)
    answers = recurx.solve(model, batch, halt=None, logits=True)
    assert torch.equal(answers.logits, expected[-1]["logits"])
    bar = float(torch.stack([e["q_halt_logits"] for e in expected]).amax(0).median())
    early = recurx.solve(model, batch, halt_above=bar, rollouts=2, sigma=0.1)
    assert early.predictions.shape == batch["inputs"].shape
    assert 4 <= int(early.rollout_steps.sum()) <= 128
