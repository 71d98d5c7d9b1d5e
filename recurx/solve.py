"""`recurx.solve`: refinement at test time. Supervision steps, early exit, rollouts.

Finished rows leave the batch: no row is computed after it halts, so a batch costs what its samples
need and not 16 times its size. With `halt=None` every row takes all the steps and the answers are
those of the official evaluation loop, bit for bit. NOTE: with early exit the batch shrinks, and
kernels may round differently at another batch size; low bits can differ, as between any two sizes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recurx import noise
from recurx.errors import BackendUnavailable, bad_argument

HALTS = ("q", None)
SELECTIONS = ("q", "vote")


@dataclass(frozen=True)
class Answers:
    """What `solve` found for B samples of T tokens, with R rollouts each.

    Args:
        predictions: [B, T] int64 token ids.
        steps: [B] int64 supervision steps of the selected rollout.
        q: [B] fp32 q_halt logits of the selected rollout at its last step.
        halted: [B] bool, whether it halted by itself; False where the budget ended it.
        rollout_steps: [B, R] int64 steps of every rollout.
        logits: [B, T, vocab] of the selected rollout, if asked for.
        trace: [steps, B, T] its predictions after each step, if asked for; a row that halted keeps
            its answer.
    """

    predictions: Tensor
    steps: Tensor
    q: Tensor
    halted: Tensor
    rollout_steps: Tensor
    logits: Tensor | None = None
    trace: Tensor | None = None

    def __len__(self) -> int:
        return len(self.predictions)

    def histogram(self) -> dict[int, int]:
        """{number of steps: how many rollouts took them}, in ascending order."""
        steps, counts = self.rollout_steps.flatten().unique(return_counts=True)
        return dict(zip(steps.tolist(), counts.tolist(), strict=True))


@torch.no_grad()
def solve(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    max_steps: int = 16,
    halt: str | None = "q",
    rollouts: int = 1,
    sigma: float = 0.0,
    select: str = "q",
    *,
    backend: str | None = None,
    halt_above: float = 0.0,
    seed: int = 0,
    logits: bool = False,
    trace: bool = False,
) -> Answers:
    """Answer a batch with at most `max_steps` supervision steps a sample, without gradient.

    Args:
        model: a recurx TRM or HRM, or an official one (patched or not), with or without its loss
            head. Runs in evaluation mode; its mode is restored.
        batch: "inputs" [B, T] integers, and "puzzle_identifiers" [B] (zeros if absent).
        max_steps: budget a sample; it may exceed the steps the model was trained with.
        halt: "q" ends a row as training does (q_halt > 0, or q_halt > q_continue with Q-learning);
            None runs every row to the budget.
        backend: what runs the recursion; None for what the model runs on. With "cuda" all steps of
            all rows are one launch: a row that halts makes room for the next inside the kernel, and
            nothing waits for the host (recurx/backends/cuda_solve.py).
        halt_above: how far q_halt must exceed that limit. It is a logit of "this answer is right":
            0 halts at even odds, 3 at 20 to 1, for more steps and fewer wrong answers.
        rollouts: noisy copies R of each sample (PTRM), from which `select` picks.
        sigma: standard deviation of the noise that is added to the answer state before each step.
        select: "q" picks the rollout with the highest q; "vote" the most frequent whole answer,
            the one with the highest q among equals.
        seed: of the noise, a counter-based stream of its own for every row and step
            (recurx/noise.py): the same seed gives the same noise on any device and backend.
        logits, trace: also return them (see `Answers`).

    Raises:
        InvalidArgument: a bad argument, or a model without the ACT interface.
        BackendUnavailable: `backend` cannot run this model here; the message says why.
    """
    _check(max_steps, halt, rollouts, sigma, select)
    if not isinstance(halt_above, (int, float)) or halt_above != halt_above:
        raise bad_argument("solve", "halt_above", "a number", repr(halt_above))
    model = _act_model(model)
    data = _complete(batch)
    samples = len(data["inputs"])
    with _evaluating(model):
        if backend == "cuda" and samples:
            found = _refine_in_kernel(
                model, data, max_steps, halt, halt_above, rollouts, sigma, seed, logits, trace
            )
        else:
            rows = {key: value.repeat_interleave(rollouts, dim=0) for key, value in data.items()}
            with _running_on(model, backend):
                found = _refine(
                    model, rows, max_steps, halt, halt_above, sigma, seed, logits, trace
                )
    return _select(found, samples, rollouts, select)


@contextlib.contextmanager
def _running_on(model: Any, backend: str | None) -> Iterator[None]:
    """Inside, the model's recursion runs on `backend` (None changes nothing)."""
    from recurx.models.inner import Inner
    from recurx.patch import patch
    from recurx.patch.handle import installed

    if backend is None:
        yield
    elif isinstance(model.inner, Inner):
        before, model.inner.backend = model.inner.backend, backend
        try:
            yield
        finally:
            model.inner.backend = before
    elif installed(model.inner, "forward") is not None:
        raise bad_argument(
            "solve", "backend", "None for a patched model", repr(backend),
            "It runs on the backend that recurx.patch(model, backend=...) was given.",
        )  # fmt: skip
    else:
        with patch(model, backend=backend):
            yield


def _refine_in_kernel(
    model: Any,
    data: dict[str, Tensor],
    max_steps: int,
    halt: str | None,
    halt_above: float,
    rollouts: int,
    sigma: float,
    seed: int,
    keep_logits: bool,
    keep_trace: bool,
) -> Answers:
    """What `_refine` does with every rollout of `data`, in one launch of the CUDA engine."""
    from recurx import backends
    from recurx.backends import cuda_solve

    first = {key: value[:1] for key, value in data.items()}
    carry = _fresh_carry(model, first).inner_carry
    fresh = carry if isinstance(carry, dict) else vars(carry)
    who = cuda_solve.reasoner(model, {name: state[0] for name, state in fresh.items()})
    if isinstance(who, str):
        raise BackendUnavailable(f"recurx.solve: backend 'cuda' {who}")
    found = cuda_solve.refine(
        backends.get("cuda"), who, data, max_steps=max_steps, halt=halt, halt_above=halt_above,
        rollouts=rollouts, sigma=sigma, seed=seed, keep_logits=keep_logits, keep_trace=keep_trace,
    )  # fmt: skip
    trace, predictions = found.trace, found.predictions
    if trace is not None:  # an entry that halted keeps its answer
        after = torch.arange(max_steps, device=trace.device)[:, None] >= found.steps
        trace = torch.where(after[..., None], predictions, trace).long()
    steps = found.steps.long()
    return Answers(
        predictions.long(), steps, found.q, found.halted.bool(), steps[:, None], found.logits, trace
    )


def _refine(
    model: Any,
    data: dict[str, Tensor],
    max_steps: int,
    halt: str | None,
    halt_above: float,
    sigma: float,
    seed: int,
    keep_logits: bool,
    keep_trace: bool,
) -> Answers:
    """Run all rows of `data`; rollouts are rows like any other here."""
    inputs = data["inputs"]
    rows, device = torch.arange(len(inputs), device=inputs.device), inputs.device
    steps = torch.zeros(len(rows), dtype=torch.int64, device=device)
    q = torch.zeros(len(rows), device=device)
    halted = torch.zeros(len(rows), dtype=torch.bool, device=device)
    predictions = torch.zeros_like(inputs, dtype=torch.int64)
    all_logits: Tensor | None = None
    trace: list[Tensor] = []
    carry = _fresh_carry(model, data)

    for step in range(max_steps):
        if len(rows) == 0:
            break
        if sigma:
            _add_noise(carry.inner_carry, sigma, rows, step, seed)
        carry, outputs = model(carry=carry, batch=carry.current_data)
        # The wrapper flags rows at its own budget, and would restart them; here `max_steps` rules.
        carry.halted = torch.zeros_like(carry.halted)
        step_logits, q_halt = outputs["logits"], outputs["q_halt_logits"].float()
        steps[rows] += 1
        q[rows] = q_halt
        predictions[rows] = step_logits.argmax(-1)
        if keep_logits:
            if all_logits is None:
                all_logits = step_logits.new_zeros(len(inputs), *step_logits.shape[1:])
            all_logits[rows] = step_logits
        if keep_trace:
            trace.append(predictions.clone())
        if halt == "q":
            done = q_halt > _threshold(model, outputs) + halt_above
            halted[rows] = done
            if done.any():
                rows, carry = rows[~done], _rows_of(carry, ~done)

    stacked = torch.stack(trace) if trace else None
    return Answers(predictions, steps, q, halted, steps[:, None], all_logits, stacked)


def _select(found: Answers, samples: int, rollouts: int, select: str) -> Answers:
    """The picked rollout of each sample, from the rows sample * rollouts + rollout."""
    by_rollout = found.q.view(samples, rollouts)
    if select == "vote" and rollouts > 1:
        answers = found.predictions.view(samples, rollouts, -1)
        same = (answers[:, :, None] == answers[:, None, :]).all(-1)
        votes = same.sum(-1)
        winners = votes == votes.amax(dim=1, keepdim=True)
        by_rollout = by_rollout.masked_fill(~winners, -torch.inf)
    first = torch.arange(samples, device=found.q.device) * rollouts
    rows = first + (by_rollout.argmax(dim=1) if samples else 0)
    return Answers(
        predictions=found.predictions[rows],
        steps=found.steps[rows],
        q=found.q[rows],
        halted=found.halted[rows],
        rollout_steps=found.steps.view(samples, rollouts),
        logits=None if found.logits is None else found.logits[rows],
        trace=None if found.trace is None else found.trace[:, rows],
    )


# ---- the model's side --------------------------------------------------------------------------


def _act_model(model: nn.Module) -> Any:
    """The ACT wrapper itself: official loss heads hold it as `.model`."""
    wrapper = model if hasattr(model, "inner") else getattr(model, "model", model)
    inner = getattr(wrapper, "inner", None)
    if not hasattr(wrapper, "initial_carry") or not hasattr(inner, "reset_carry"):
        raise bad_argument(
            "solve", "model", "a TRM or HRM with initial_carry() and inner.reset_carry()",
            type(model).__name__, "Use recurx.models.TRM, or an official model.",
        )  # fmt: skip
    return wrapper


def _complete(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    inputs = batch.get("inputs") if isinstance(batch, Mapping) else None
    if not isinstance(inputs, Tensor) or inputs.ndim != 2 or inputs.is_floating_point():
        got = f"{inputs.dtype} {list(inputs.shape)}" if isinstance(inputs, Tensor) else repr(inputs)
        raise bad_argument("solve", "batch['inputs']", "integer token ids [B, T]", got)
    identifiers = batch.get("puzzle_identifiers")
    if identifiers is None:
        identifiers = torch.zeros(len(inputs), dtype=torch.int32, device=inputs.device)
    return {**batch, "puzzle_identifiers": identifiers}


def _fresh_carry(model: Any, data: dict[str, Tensor]) -> Any:
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


def _add_noise(states: Any, sigma: float, rows: Tensor, step: int, seed: int) -> None:
    """Add sigma * N(0, 1) to the state that the heads read: z_H, or the only one.

    The noise follows from (seed, row, step) alone, so it does not depend on a row's neighbours.
    """
    values = states if isinstance(states, dict) else vars(states)
    name = "z_H" if "z_H" in values else next(iter(values))
    state = values[name]
    drawn = noise.normals(rows, step, tuple(state.shape[1:]), seed)
    values[name] = state + (sigma * drawn).to(state.dtype)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with the mode of every submodule restored afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check(max_steps: int, halt: str | None, rollouts: int, sigma: float, select: str) -> None:
    for arg, value in (("max_steps", max_steps), ("rollouts", rollouts)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise bad_argument("solve", arg, "an int >= 1", repr(value))
    if halt not in HALTS:
        raise bad_argument("solve", "halt", f"one of {HALTS}", repr(halt))
    if not 0 <= sigma < float("inf"):
        raise bad_argument("solve", "sigma", "a finite number >= 0", repr(sigma))
    if select not in SELECTIONS:
        raise bad_argument("solve", "select", f"one of {SELECTIONS}", repr(select))
