"""Rollouts: several tries of each sample, and which of them counts.

A try has the number sample * rollouts + rollout; its noise and its random start follow from it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from recurx.errors import bad_argument
from recurx.solving.halting_loop import Answers
from recurx.solving.options import Accepts, Rules

Run = Callable[[Mapping[str, Tensor], Tensor], Answers]  # (data of N rows, their [N] numbers)


def of_samples(
    runner: Callable[[Rules], Run], data: Mapping[str, Tensor], samples: Tensor, rules: Rules
) -> Answers:
    """All tries of n boards, one batch of n * `rules.rollouts` rows.

    Args:
        samples: [n] numbers of the samples that the boards belong to.
    """
    rows = {key: value.repeat_interleave(rules.rollouts, dim=0) for key, value in data.items()}
    tries = torch.arange(rules.rollouts, device=samples.device)
    return runner(rules)(rows, (samples[:, None] * rules.rollouts + tries).flatten())


def at_once(run: Run, data: Mapping[str, Tensor], rollouts: int, select: str | Accepts) -> Answers:
    """All tries in one batch, then the pick of each sample."""
    samples = len(data["inputs"])
    rows = {key: value.repeat_interleave(rollouts, dim=0) for key, value in data.items()}
    numbers = torch.arange(samples * rollouts, device=data["inputs"].device)
    return pick(run(rows, numbers), data["inputs"], rollouts, select)


def in_turn(run: Run, data: Mapping[str, Tensor], rollouts: int, accepts: Accepts) -> Answers:
    """One try after the other, of the samples that have no accepted answer yet; the picks are
    those of `at_once`, and tries that were not made took 0 steps."""
    inputs = data["inputs"]
    left = torch.arange(len(inputs), device=inputs.device)
    found: Answers | None = None
    for turn in range(rollouts):
        tried = run({key: value[left] for key, value in data.items()}, left * rollouts + turn)
        accepted = checked(accepts, inputs[left], tried.predictions)
        if found is None:
            found = replace(tried, rollout_steps=tried.steps.new_zeros(len(inputs), rollouts))
        else:
            found = _updated(found, tried, left, accepted | (rank(tried.q) > rank(found.q[left])))
        found.rollout_steps[left, turn] = tried.steps
        left = left[~accepted]
        if len(left) == 0:
            break
    assert found is not None
    _say_if_nan(found)
    return found


def pick(found: Answers, inputs: Tensor, rollouts: int, select: str | Accepts) -> Answers:
    """The picked try of each sample, from rows that hold all of them."""
    _say_if_nan(found)
    samples = len(inputs)
    settled = -found.residual if select == "residual" else found.q  # type: ignore[operator]
    score = rank(settled).view(samples, rollouts)
    if select == "vote" and rollouts > 1:
        answers = found.predictions.view(samples, rollouts, found.predictions.shape[1])
        same = (answers[:, :, None] == answers[:, None, :]).all(-1)
        votes = (same & (score > -torch.inf)[:, None, :]).sum(-1)
        score = score.masked_fill(votes < votes.amax(dim=1, keepdim=True), -torch.inf)
    elif callable(select):
        every = inputs.repeat_interleave(rollouts, dim=0)
        accepted = checked(select, every, found.predictions).view(samples, rollouts)
        score = torch.where(accepted, torch.inf, score)  # argmax takes the first of equals
    first = torch.arange(samples, device=inputs.device) * rollouts
    rows = first + (score.argmax(dim=1) if samples else 0)
    return Answers(
        predictions=found.predictions[rows],
        steps=found.steps[rows],
        q=found.q[rows],
        halted=found.halted[rows],
        rollout_steps=found.steps.view(samples, rollouts),
        logits=None if found.logits is None else found.logits[rows],
        trace=None if found.trace is None else found.trace[:, rows],
        residual=None if found.residual is None else found.residual[rows],
    )


def rank(q: Tensor) -> Tensor:
    """q in an order in which NaN, of a row that computed nonsense, comes last."""
    return torch.nan_to_num(q, nan=-torch.inf)


def _say_if_nan(found: Answers) -> None:
    if found.q.isnan().any():
        text = "recurx.solve: q is NaN: the weights, or the states they lead to, hold NaN or inf"
        warnings.warn(f"{text}. Take an earlier checkpoint.", RuntimeWarning, stacklevel=2)


def checked(accepts: Accepts, inputs: Tensor, answers: Tensor) -> Tensor:
    """What the user's function says.

    Raises:
        InvalidArgument: it is not a bool for each row.
    """
    said = accepts(inputs, answers)
    wanted = f"a function that returns bool [{len(inputs)}]"
    if not isinstance(said, Tensor):
        raise bad_argument("solve", "select", wanted, type(said).__name__)
    if said.dtype != torch.bool or said.shape != (len(inputs),):
        raise bad_argument("solve", "select", wanted, f"{said.dtype} {list(said.shape)}")
    return said.to(inputs.device)


def _updated(found: Answers, tried: Answers, left: Tensor, better: Tensor) -> Answers:
    """`found` with the rows `left[better]` of a later try in place of the earlier ones."""
    rows = left[better]
    for name in ("predictions", "steps", "q", "halted", "logits", "residual"):
        values, later = getattr(found, name), getattr(tried, name)
        if values is not None:
            values[rows] = later[better]
    if found.trace is None or tried.trace is None:
        return found
    longest = max(len(found.trace), len(tried.trace))
    trace, later = as_long(found.trace, longest), as_long(tried.trace, longest)
    trace[:, rows] = later[:, better]
    return replace(found, trace=trace)


def as_long(trace: Tensor, steps: int) -> Tensor:
    """A trace that goes on with its last answers: rows that ended keep theirs."""
    return torch.cat([trace, trace[-1:].expand(steps - len(trace), -1, -1)])
