"""Solving inside the CUDA engine: one launch runs all supervision steps of a queue of samples.

An owner that finishes a sample takes the next one from the queue (csrc/cuda/owner_sm80/solve.cuh),
so no sample is computed after it halts, no slot is padded and the host waits for nothing. The input
embedding is the model's own code, before the launch; heads and halting are in the kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recurx.backends import cuda_abi
from recurx.backends.cuda import Cuda
from recurx.errors import BackendUnavailable
from recurx.nets import Net, as_net
from recurx.operands import Operands, Span
from recurx.plan import cuda as plans
from recurx.problem import Problem
from recurx.schedule import Schedule

HALTS = {None: 0, "q": 1, "q_continue": 2}


@dataclass(frozen=True)
class Reasoner:
    """What a model is to the kernel.

    Args:
        schedule, nets, cos_sin: the recursion.
        output: the state that the heads read.
        start: [T, D] of each state of a fresh sample.
        embed: the batch to the embedded input x [N, T, D].
        lm_head, q_head, q_bias: [vocab, D], [2, D] (q_halt, q_continue), [2].
        prefix: tokens before the answer.
        q_learning: whether q_halt is compared with q_continue instead of 0.
    """

    schedule: Schedule
    nets: dict[str, Net]
    cos_sin: tuple[Tensor, Tensor] | None
    output: str
    start: dict[str, Tensor]
    embed: Callable[[Mapping[str, Tensor]], Tensor]
    lm_head: Tensor
    q_head: Tensor
    q_bias: Tensor
    prefix: int
    q_learning: bool

    def problem(self, entries: int, device_type: str) -> Problem:
        """The recursion of the queue, as plans see it."""
        specs = tuple((name, self.nets[name].spec) for name in self.schedule.nets)
        state = self.start[self.output]
        return Problem(
            self.schedule, specs, entries, *state.shape, state.dtype, device_type,
            rope=self.cos_sin is not None,
        )  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What the queue's entries came to, all on the device: predictions [E, T'] int32, steps [E],
    halted [E] int32, q [E] fp32, logits [E, T', vocab] bf16 and trace [steps, E, T'] if wanted."""

    predictions: Tensor
    steps: Tensor
    halted: Tensor
    q: Tensor
    logits: Tensor | None
    trace: Tensor | None


def reasoner(model: Any, fresh: Mapping[str, Tensor]) -> Reasoner | str:
    """The reasoner in an ACT wrapper of recurx or official code, or why there is none.

    Args:
        model: the wrapper, with `.inner` and `.config`.
        fresh: {state: [T, D]} of a fresh sample, under the attribute names of the carry.
    """
    from recurx.models.inner import Inner
    from recurx.patching.official import Official

    inner = model.inner
    q_learning = not getattr(model.config, "no_ACT_continue", False)
    heads = (inner.lm_head.weight, inner.q_head.weight, inner.q_head.bias)
    if isinstance(inner, Inner):
        nets = {name: as_net(net, name) for name, net in inner.nets().items()}
        if not all(isinstance(net, Net) for net in nets.values()):
            return "cannot look inside the model's nets"
        return Reasoner(
            inner.schedule, nets, inner.cos_sin(), inner.variant.output,  # type: ignore[arg-type]
            {name: fresh[name] for name in inner.schedule.states},
            lambda batch: inner.embed(batch["inputs"], batch["puzzle_identifiers"]),
            *heads, inner.config.prefix_len, q_learning,
        )  # fmt: skip
    adapter = Official()
    differences = adapter.differences(inner)
    if differences:
        return "cannot solve with foreign code: " + "; ".join(differences)
    plan = adapter.recipe(inner, "cuda")
    start = {name: fresh[attribute] for name, attribute in plan.states}
    return Reasoner(
        plan.schedule,
        {name: as_net(getattr(inner, attribute), name) for name, attribute in plan.nets},  # type: ignore[misc]
        inner.rotary_emb() if plan.rope else None,
        plan.output,
        start,
        lambda batch: inner._input_embeddings(batch["inputs"], batch["puzzle_identifiers"]).to(
            start[plan.output].dtype
        ),
        *heads, inner.puzzle_emb_len, q_learning,
    )  # fmt: skip


def refine(
    backend: Cuda,
    who: Reasoner,
    batch: Mapping[str, Tensor],
    *,
    max_steps: int,
    halt: str | None,
    halt_above: float = 0.0,
    rollouts: int = 1,
    sigma: float = 0.0,
    seed: int = 0,
    keep_logits: bool = False,
    keep_trace: bool = False,
) -> Found:
    """Refine every rollout of every puzzle of `batch` in one launch.

    Args:
        batch: "inputs" [N, seq_len] and "puzzle_identifiers" [N], N >= 1.
        halt, halt_above, sigma, seed: as in `recurx.solve`.

    Raises:
        BackendUnavailable: the kernel cannot run this model here; the message says why.
    """
    device = batch["inputs"].device
    entries = len(batch["inputs"]) * rollouts
    problem = who.problem(entries, device.type)
    plan = owner_plan(backend, problem, device)
    library = backend.library()
    assert library is not None, "checked by owner_plan"
    owner = cuda_abi.RxOwnerPlan(*(plan[name] for name in ("owners", "samples", "tiles")))
    slots = owner.owners * owner.samples
    tokens, hidden, answers = problem.tokens, problem.hidden, problem.tokens - who.prefix
    vocab = len(who.lm_head)
    halting = "q_continue" if halt == "q" and who.q_learning else halt

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return backend.new(shape, dtype, device)

    with backend.on(device) as stream:
        x = who.embed(batch).detach().contiguous()
        slot_x = torch.zeros(slots, tokens, hidden, dtype=x.dtype, device=device)
        states = tuple(torch.zeros_like(slot_x) for _ in who.schedule.states)
        start = [who.start[name].detach().contiguous() for name in who.schedule.states]
        heads = [w.detach().to(x.dtype).contiguous() for w in (who.lm_head, who.q_head, who.q_bias)]
        next_entry = torch.zeros(1, dtype=torch.int32, device=device)
        found = Found(
            new(entries, answers), new(entries), new(entries), new(entries, dtype=torch.float32),
            new(entries, answers, vocab, dtype=x.dtype) if keep_logits else None,
            new(max_steps, entries, answers) if keep_trace else None,
        )  # fmt: skip
        running = dataclasses.replace(problem, batch=slots)
        weights = tuple(w for name in who.schedule.nets for w in who.nets[name].weights)
        p, kept = backend.describe(
            plan.kind, running, Operands(slot_x, states, weights, who.cos_sin), states,
            Span(0, len(who.schedule)), stream,
        )  # fmt: skip
        size = library.bytes_of("rx_owner_sm80_scratch_bytes", p, owner)
        scratch = new(size, dtype=torch.uint8)
        p.scratch, p.scratch_bytes = scratch.data_ptr(), size
        s = cuda_abi.RxSolve(
            entries, rollouts, max_steps, HALTS[halting],
            who.schedule.states.index(who.output), who.prefix, vocab, halt_above, sigma, seed,
            x=x.data_ptr(), slot_x=slot_x.data_ptr(), lm_head=heads[0].data_ptr(),
            q_head=heads[1].data_ptr(), q_bias=heads[2].data_ptr(), next=next_entry.data_ptr(),
            predictions=found.predictions.data_ptr(), steps=found.steps.data_ptr(),
            halted=found.halted.data_ptr(), q=found.q.data_ptr(),
            logits=None if found.logits is None else found.logits.data_ptr(),
            trace=None if found.trace is None else found.trace.data_ptr(),
        )  # fmt: skip
        s.start[: len(start)] = [state.data_ptr() for state in start]
        library.call("rx_owner_sm80_solve", p, owner, s, stream)
        del kept
    return found


def owner_plan(backend: Cuda, problem: Problem, device: torch.device) -> Any:
    """The owner kernel's plan for a queue of `problem.batch` entries.

    Raises:
        BackendUnavailable: with the reason.
    """
    reason = backend.why_unavailable()
    if reason is None:
        where, compiled = backend.plan_device(device), backend.owner_plans
        found = plans.candidates(problem, where, compiled, ("owner",))
        if found:
            return min(found, key=lambda plan: (plan.seconds(where), plan.settings))
        reason = "; ".join(plans.refusals(problem, where, compiled, ("owner",)))
    raise BackendUnavailable(f"recurx.solve: backend 'cuda' {reason}")
