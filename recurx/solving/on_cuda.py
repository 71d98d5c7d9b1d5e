"""Solving inside the CUDA engine: one launch runs all supervision steps of a queue of samples.

A slot whose sample ends takes the next one from the queue (csrc/cuda/solve.cuh), so the host waits
for nothing; the owner kernel computes no sample after it halts, and the cluster kernel only while
the queue is empty and another sample of its cluster goes on. The input embedding is the model's own
code, before the launch; heads and halting are in the kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recurx import backends
from recurx.backends import cuda_abi
from recurx.backends.cuda_launch import Launch
from recurx.errors import BackendUnavailable
from recurx.operands import Operands, Span
from recurx.plan.cuda import slots as slots_of
from recurx.solving.halting_loop import Answers, fresh_carry, named
from recurx.solving.options import Rules
from recurx.solving.reasoner import reasoner

HALTS = {None: 0, "q": 1, "q_continue": 2}


def refine(model: Any, batch: Mapping[str, Tensor], rules: Rules) -> Answers:
    """What `halting_loop.refine` does with every rollout of every puzzle of `batch`, in one launch.

    Args:
        model: as in `reasoner`.
        batch: "inputs" [N, seq_len] and "puzzle_identifiers" [N], N >= 1.

    Raises:
        BackendUnavailable: the kernel cannot run this model or these rules here; the message says
            why.
    """
    fresh = fresh_carry(model, {key: value[:1] for key, value in batch.items()}).inner_carry
    start = {name: state[0] for name, state in named(fresh).items()}
    who = _beyond_the_kernel(rules) or reasoner(model, start)
    if isinstance(who, str):
        raise BackendUnavailable(f"recurx.solve: backend 'cuda' {who}")
    backend, device = backends.get("cuda"), batch["inputs"].device
    entries, vocab = len(batch["inputs"]) * rules.rollouts, len(who.lm_head)
    problem = who.problem(entries, device.type)
    plan = backend.queue_plan(problem, device)
    library = backend.library()
    assert library is not None, "checked by queue_plan"
    slots = slots_of(plan)
    tokens, hidden, answers = problem.tokens, problem.hidden, problem.tokens - who.prefix
    halting = "q_continue" if rules.halt == "q" and who.q_learning else rules.halt

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return backend.new(shape, dtype, device)

    with backend.on(device) as stream:
        x = who.embed(batch).detach().contiguous()
        slot_x = new(slots, tokens, hidden, dtype=x.dtype).zero_()
        states = tuple(new(*slot_x.shape, dtype=x.dtype).zero_() for _ in who.schedule.states)
        starts = [who.start[name].detach().contiguous() for name in who.schedule.states]
        heads = [w.detach().to(x.dtype).contiguous() for w in (who.lm_head, who.q_head, who.q_bias)]
        next_entry = new(1).zero_()
        predictions, steps, halted = new(entries, answers), new(entries), new(entries)
        q = new(entries, dtype=torch.float32)
        logits = new(entries, answers, vocab, dtype=x.dtype) if rules.logits else None
        trace = new(rules.max_steps, entries, answers) if rules.trace else None
        running = dataclasses.replace(problem, batch=slots)
        weights = tuple(w for name in who.schedule.nets for w in who.nets[name].weights)
        operands = Operands(slot_x, states, weights, who.cos_sin)
        operands.check_memory(who.schedule.states, running.nets)
        span = Span(0, len(who.schedule))
        p, kept = backend.describe(plan.kind, running, operands, states, span, stream)
        launch = Launch.of(library, plan, p, "solve")
        scratch = new(launch.scratch_bytes, dtype=torch.uint8)
        p.scratch, p.scratch_bytes = scratch.data_ptr(), launch.scratch_bytes
        s = cuda_abi.RxSolve(
            entries, rules.rollouts, rules.max_steps, HALTS[halting],
            who.schedule.states.index(who.output), who.prefix, vocab, rules.halt_above,
            rules.sigma, rules.seed,
            x=x.data_ptr(), slot_x=slot_x.data_ptr(), lm_head=heads[0].data_ptr(),
            q_head=heads[1].data_ptr(), q_bias=heads[2].data_ptr(), next=next_entry.data_ptr(),
            predictions=predictions.data_ptr(), steps=steps.data_ptr(), halted=halted.data_ptr(),
            q=q.data_ptr(), logits=None if logits is None else logits.data_ptr(),
            trace=None if trace is None else trace.data_ptr(),
        )  # fmt: skip
        s.start[: len(starts)] = [state.data_ptr() for state in starts]
        library.call(launch.entry, p, launch.settings, s, stream)
        del kept
    if trace is not None:  # an entry that halted keeps its answer
        after = torch.arange(rules.max_steps, device=device)[:, None] >= steps
        trace = torch.where(after[..., None], predictions, trace).long()
    steps = steps.long()
    return Answers(predictions.long(), steps, q, halted.bool(), steps[:, None], logits, trace)


def _beyond_the_kernel(rules: Rules) -> str:
    """What the kernel lacks that `rules` ask for ("" if nothing), and what to do."""
    asked = {
        f"halt={rules.halt!r}": rules.halt not in ("q", None),
        f"select={rules.select!r}": rules.select == "residual",
        f"init={rules.init!r}": rules.init != "learned",
        f"first_sample={rules.first_sample}": bool(rules.first_sample and rules.sigma),
        "fill": rules.fill is not None,
    }
    lacks = [name for name, beyond in asked.items() if beyond]
    if not lacks:
        return ""
    return (
        f"solves in its kernel without {' and '.join(lacks)}: leave `backend` out and set "
        "model.backend = 'cuda' (the loop on the host over the same kernels)."
    )
