"""Solving inside the CPU engine: one call refines a queue of rows (csrc/cpu/solve.cpp).

A thread that is done with a row takes the next one, so no row is computed after it halts and no
Python runs between two supervision steps. States are those of the loop over the same engine, to the
bit; whether a row ends, the engine's own heads say, in fp32 another order of the same sum. The
embedding, random starts and the heads that read the last states are the model's own code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recurx import backends
from recurx.models.inner import Inner
from recurx.models.layers import CastLinear
from recurx.noise import DRAWN
from recurx.operands import Operands
from recurx.problem import Problem
from recurx.route import route
from recurx.schedule import LEARNED
from recurx.solving.halting_loop import Answers, fresh_carry, named, randomise
from recurx.solving.options import Rules
from recurx.solving.reasoner import Reasoner, reasoner
from recurx.solving.rollouts import Run, as_long

MOST_BYTES = 1 << 24  # of embedded rows at once
LEAST_ROWS = 16  # a thread, at once: the last ones leave other threads idle
Progress = Callable[[int], None]


def refiner(
    model: Any, data: Mapping[str, Tensor], rules: Rules, how: Mapping[str, Any], loop: Run,
    progress: Progress | None,
) -> Run:  # fmt: skip
    """What refines rows: the engine where it has the recursion and all that `rules` ask for, else
    `loop`.

    Args:
        model: an ACT wrapper.
        how: the keywords by which the loop calls it; none for a model that is not recurx's own,
            whose wrapper may do more than the engine knows.
    """
    inputs = data["inputs"]
    inside = how and inputs.device.type == "cpu" and len(inputs) and not rules.needs_loop
    if not inside or torch.is_autocast_enabled("cpu") or not _plain(model):
        return loop
    fresh = fresh_carry(model, {key: value[:1] for key, value in data.items()}).inner_carry
    who = reasoner(model, {name: state[0] for name, state in named(fresh).items()})
    if isinstance(who, str):
        return loop
    backend = how["backend"] or model.backend

    def run(rows: Mapping[str, Tensor], numbers: Tensor) -> Answers:
        # With fewer rows than threads, the loop splits each row over several. The engine's noise
        # counts rows in 32 bits.
        many = len(numbers) >= torch.get_num_threads()
        if not many or int(rules.entries(numbers).max()) >= 1 << 32:
            return loop(rows, numbers)
        if not _engine_runs(who.problem(len(numbers), "cpu"), backend):
            return loop(rows, numbers)
        return _refine(model.inner, who, rows, numbers, rules, progress)

    return run


def _engine_runs(problem: Problem, backend: str) -> bool:
    """Whether the loop would run all calls on the CPU engine."""
    # Draws go by a sample's place in the batch, which changes; masks and factors belong to a call.
    if {"noise", *DRAWN, "key_padding", LEARNED} & {*problem.changed}:
        return False
    if backend == "cpu":
        return backends.why_not("cpu", problem) is None  # else the loop says why it cannot
    calls = route(problem).calls
    return backend == "auto" and calls.backend == "cpu" and calls.settled


def _plain(model: Any) -> bool:
    """Whether the heads are what the engine computes, and nobody watches modules that it skips."""
    heads = (model.inner.lm_head, model.inner.q_head)
    return not any(
        module._forward_hooks or module._forward_pre_hooks for module in model.modules()
    ) and all(type(head) is CastLinear for head in heads)


def _refine(
    inner: Inner, who: Reasoner, rows: Mapping[str, Tensor], numbers: Tensor, rules: Rules,
    progress: Progress | None,
) -> Answers:  # fmt: skip
    start = who.start[who.output]
    most = MOST_BYTES // (start.nbytes * (1 + len(who.start) * _draws(rules)))
    most = max(LEAST_ROWS * torch.get_num_threads(), most)
    parts: list[Answers] = []
    for first in range(0, len(numbers), most):
        chosen = slice(first, first + most)
        told = None if progress is None else lambda done, first=first: progress(first + done)
        part = {key: value[chosen] for key, value in rows.items()}
        parts.append(_refine_part(inner, who, part, numbers[chosen], rules, told))
    return _joined(parts) if len(parts) > 1 else parts[0]


def _joined(parts: Sequence[Answers]) -> Answers:
    """The answers of all rows, in their order."""
    if parts[0].trace is not None:
        longest = max(len(part.trace) for part in parts)  # type: ignore[arg-type]
        parts = [dataclasses.replace(p, trace=as_long(p.trace, longest)) for p in parts]
    found = {}
    for field in dataclasses.fields(Answers):
        values = [getattr(part, field.name) for part in parts]
        axis = 1 if field.name == "trace" else 0
        found[field.name] = None if values[0] is None else torch.cat(values, dim=axis)
    return Answers(**found)


def _draws(rules: Rules) -> bool:
    return rules.init == "random" and rules.rollouts > 1


def _refine_part(
    inner: Inner, who: Reasoner, rows: Mapping[str, Tensor], numbers: Tensor, rules: Rules,
    progress: Progress | None,
) -> Answers:  # fmt: skip
    count, dtype = len(numbers), who.start[who.output].dtype
    problem = who.problem(count, "cpu")
    starts = {name: state.contiguous() for name, state in who.start.items()}
    if _draws(rules):
        starts = {name: state.expand(count, -1, -1) for name, state in starts.items()}
        randomise(starts, numbers, rules)
    x = who.embed(rows).to(dtype).contiguous()
    lm_head, q_head = (head.detach().to(dtype).contiguous() for head in (who.lm_head, who.q_head))
    answers, vocab = problem.tokens - who.prefix, len(lm_head)
    steps, halted = x.new_zeros(count, dtype=torch.int64), x.new_zeros(count, dtype=torch.bool)
    read = steps.new_zeros(count, answers)
    trace = steps.new_zeros(rules.max_steps, count, answers) if rules.trace else None
    final = torch.empty_like(x)
    kept = {
        "numbers": rules.entries(numbers).contiguous(), "lm_head": lm_head, "q_head": q_head,
        "steps": steps, "halted": halted, "final": final, "answers": read, "trace": trace,
    }  # fmt: skip
    how: dict[str, Any] = {
        "max_steps": rules.max_steps, "by_q": rules.halt in ("q", "any"),
        "against_continue": who.q_learning, "by_answer": rules.compares, "above": rules.halt_above,
        "patience": rules.patience, "sigma": rules.sigma, "seed": rules.seed,
        "start_each": _draws(rules), "output": 1 + who.schedule.states.index(who.output),
        "prefix": who.prefix, "vocab": vocab, "q_bias": tuple(who.q_bias.to(dtype).tolist()),
    }  # fmt: skip
    how |= {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in kept.items()}
    weights = tuple(w for name in who.schedule.nets for w in who.nets[name].weights)
    states = tuple(starts[name] for name in who.schedule.states)
    operands = Operands(x, states, weights, who.cos_sin)
    operands.check_memory(who.schedule.states, problem.nets)
    engine: Any = backends.get("cpu")
    engine.solve(problem, operands, how, progress)
    if progress is not None:
        progress(count)
    logits, q, _ = inner.heads({who.output: final})
    predictions = logits.argmax(-1)
    if trace is not None:  # a row that halted keeps its answer
        trace = trace[: int(steps.max())]
        after = torch.arange(1, 1 + len(trace), device="cpu")[:, None] >= steps
        trace = torch.where(after[..., None], predictions, trace)
    given = logits if rules.logits else None
    return Answers(predictions, steps, q.float(), halted, steps[:, None], given, trace)
