"""The loop behind `recurx.solve`: supervision steps, halting rules, start states and noise.

Rows that end leave the batch, so no row is computed after it halts. Everything that decides about a
row stays on the device; a step waits for it once, to know whether rows left.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recurx.errors import bad_argument
from recurx.solving import noise
from recurx.solving.options import Rules


@dataclass(frozen=True)
class Answers:
    """What `solve` found for B samples of T tokens, with R rollouts each.

    Args:
        predictions: [B, T] int64 token ids.
        steps: [B] int64 supervision steps of the selected rollout.
        q: [B] fp32 q_halt logits of the selected rollout at its last step.
        halted: [B] bool, whether it halted by itself; False where the budget ended it.
        rollout_steps: [B, R] int64 steps of every rollout, 0 if it was not needed.
        logits: [B, T, vocab] of the selected rollout, if asked for.
        trace: [steps, B, T] its predictions after each step, if asked for; a row that halted keeps
            its answer.
        residual: [B] fp32 relative change of its answer state in its last step, where that counts.
        verdicts: of a search, how each sample ended (`recurx.Search` tells). There "selected" is
            the accepted try, or the best of the last ones.
    """

    predictions: Tensor
    steps: Tensor
    q: Tensor
    halted: Tensor
    rollout_steps: Tensor
    logits: Tensor | None = None
    trace: Tensor | None = None
    residual: Tensor | None = None
    verdicts: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.predictions)

    def histogram(self) -> dict[int, int]:
        """{number of steps: how many rollouts took them}, in ascending order."""
        taken = self.rollout_steps[self.rollout_steps > 0]
        steps, counts = taken.unique(return_counts=True)
        return dict(zip(steps.tolist(), counts.tolist(), strict=True))


def refine(
    model: Any, data: Mapping[str, Tensor], numbers: Tensor, rules: Rules,
    progress: Callable[[int], None] | None = None, **how: Any,
) -> Answers:  # fmt: skip
    """Run all rows of `data`; rollouts are rows like any other here.

    Args:
        numbers: [N] int64, sample * rollouts + rollout of each row, which its noise and its random
            start follow from.
        progress: called after each step with how many rows have ended.
        how: further keywords of the model's calls.
    """
    inputs = data["inputs"]
    rows, device = torch.arange(len(inputs), device=inputs.device), inputs.device
    steps = torch.zeros(len(rows), dtype=torch.int64, device=device)
    unchanged = torch.zeros_like(steps)
    q = torch.zeros(len(rows), device=device)
    halted = torch.zeros(len(rows), dtype=torch.bool, device=device)
    predictions = torch.zeros_like(inputs, dtype=torch.int64)
    all_logits: Tensor | None = None
    trace: list[Tensor] = []
    residual = torch.zeros_like(q) if rules.needs_loop else None
    carry = _start(model, data, numbers, rules)

    for step in range(rules.max_steps):
        if len(rows) == 0:
            break
        _, before = _answer_state(carry.inner_carry)
        if rules.sigma:
            _add_noise(carry.inner_carry, numbers[rows], step, rules)
        carry, outputs = model(carry=carry, batch=carry.current_data, **how)
        # The wrapper flags rows at its own budget, and would restart them; here `max_steps` rules.
        carry.halted = torch.zeros_like(carry.halted)
        step_logits, q_halt = outputs["logits"], outputs["q_halt_logits"].float()
        answers = step_logits.argmax(-1)
        if not step and answers.shape != inputs.shape:  # an answer may have a length of its own
            predictions = predictions.new_zeros(len(inputs), answers.shape[1])
        ends: list[Tensor] = []  # by each rule, which rows end now
        if rules.fill:
            question = carry.current_data["inputs"]
            if question.shape != answers.shape:
                raise bad_argument(
                    "solve", "fill", "a model whose answers are as long as its questions",
                    f"{answers.shape[1]} tokens for {question.shape[1]}", "Leave `fill` out.",
                )  # fmt: skip
            blank = question == rules.fill.blank
            ends.append(~blank.any(-1))
            answers = torch.where(blank, answers, question)
        if step and rules.compares:  # the first answer has none before it
            same = (answers == predictions[rows]).all(-1)
            unchanged[rows] = torch.where(same, unchanged[rows] + 1, 0)
        steps[rows] += 1
        q[rows] = q_halt
        predictions[rows] = answers
        if residual is not None:
            residual[rows] = _moved(before, _answer_state(carry.inner_carry)[1])
        if rules.logits:
            if all_logits is None:
                all_logits = step_logits.new_zeros(len(inputs), *step_logits.shape[1:])
            all_logits[rows] = step_logits
        if rules.trace:
            trace.append(predictions.clone())
        if rules.halt == "entropy":
            doubt = torch.special.entr(step_logits.float().softmax(-1)).sum(-1).mean(-1)
            ends.append(doubt < rules.halt_below)
        elif residual is not None and rules.halt == "residual":
            ends.append(residual[rows] < rules.halt_below)
        elif rules.halt is not None:
            wants = q_halt > _threshold(model, outputs) + rules.halt_above
            ends.append(rules.ends(wants, unchanged[rows]))
        if rules.fill and (step + 1) % rules.fill.steps == 0:
            likely = step_logits.float().softmax(-1).amax(-1)
            question = torch.where(_sure(likely, blank, rules.fill.above), answers, question)
            carry = _start(model, {**carry.current_data, "inputs": question}, numbers[rows], rules)
        if ends:
            halted[rows] = done = functools.reduce(torch.logical_or, ends)
            if done.any():
                rows, carry = rows[~done], _rows_of(carry, ~done)
        if progress is not None:
            progress(len(inputs) if step + 1 == rules.max_steps else len(inputs) - len(rows))

    stacked = torch.stack(trace) if trace else None
    return Answers(predictions, steps, q, halted, steps[:, None], all_logits, stacked, residual)


def _sure(likely: Tensor, blank: Tensor, above: float) -> Tensor:
    """[N, T] which blanks are filled now: those over `above`, and in any case the likeliest."""
    likely = likely.masked_fill(~blank, -1)
    best = torch.zeros_like(blank).scatter_(1, likely.argmax(-1, keepdim=True), True)
    return blank & ((likely > above) | best)


def _start(model: Any, data: Mapping[str, Tensor], numbers: Tensor, rules: Rules) -> Any:
    """The carry that rows of these numbers begin with."""
    carry = fresh_carry(model, data)
    if rules.init == "random" and rules.rollouts > 1:
        randomise(carry.inner_carry, numbers, rules)
    return carry


def fresh_carry(model: Any, data: Mapping[str, Tensor]) -> Any:
    """The carry in which every row holds its sample and the initial states, as the wrapper's first
    step makes it; made here so that noise can reach the first step too."""
    with data["inputs"].device:  # official code creates its carry on the default device
        carry = model.initial_carry(data)
    carry.inner_carry = model.inner.reset_carry(carry.halted, carry.inner_carry)
    carry.halted = torch.zeros_like(carry.halted)
    carry.current_data = dict(data)
    return carry


def _threshold(model: Any, outputs: Mapping[str, Tensor]) -> Tensor | float:
    """What q_halt must exceed: 0, or q_continue in models trained with Q-learning (HRM)."""
    if getattr(model.config, "no_ACT_continue", False):
        return 0.0
    return outputs["q_continue_logits"].float()


def _rows_of(value: Any, keep: Tensor) -> Any:
    """The kept rows of every tensor in a carry of dicts and dataclasses (ours and official)."""
    if isinstance(value, Tensor):
        return value[keep]
    if isinstance(value, Mapping):
        return {key: _rows_of(item, keep) for key, item in value.items()}
    fields = {f.name: _rows_of(getattr(value, f.name), keep) for f in dataclasses.fields(value)}
    return type(value)(**fields)


def named(states: Any) -> dict[str, Tensor]:
    """The states of a carry by name: ours are a dict, official ones a dataclass."""
    return states if isinstance(states, dict) else vars(states)


def _answer_state(states: Any) -> tuple[str, Tensor]:
    """The name and value of the state that the heads read: z_H, or the only one."""
    values = named(states)
    name = "z_H" if "z_H" in values else next(iter(values))
    return name, values[name]


def _moved(before: Tensor, after: Tensor) -> Tensor:
    """[N] fp32 mean over tokens of |change| / |state| of states [N, T, D]."""
    change = after.to(torch.float32, copy=True).sub_(before).norm(dim=-1)
    return (change / after.float().norm(dim=-1).clamp_min(1e-12)).mean(-1)


def _add_noise(states: Any, numbers: Tensor, step: int, rules: Rules) -> None:
    """Add sigma * N(0, 1) to the state that the heads read: z_H, or the only one.

    The noise follows from (seed, number, step) alone, so it does not depend on a row's neighbours.
    """
    name, state = _answer_state(states)
    drawn = noise.normals(rules.entries(numbers), step, tuple(state.shape[1:]), rules.seed)
    named(states)[name] = state + drawn.mul_(rules.sigma).to(state.dtype)


def randomise(states: Any, numbers: Tensor, rules: Rules) -> None:
    """Give every rollout but the first of its sample a start of its own, in all states."""
    keeps = (numbers % rules.rollouts == 0).view(-1, 1, 1)
    values = named(states)
    for which, name in enumerate(sorted(values)):
        state = values[name]
        shape = tuple(state.shape[1:])
        drawn = noise.truncated_normals(rules.entries(numbers), which, shape, rules.seed)
        values[name] = torch.where(keeps, state, (rules.init_scale * drawn).to(state.dtype))
