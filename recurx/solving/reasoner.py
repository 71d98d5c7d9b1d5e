"""What a model is to an engine that solves by itself: the recursion, its start, and its heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from recurx.nets import Net
from recurx.problem import Problem
from recurx.proof import as_net
from recurx.schedule import Schedule


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
        if inner.config.feedback:
            return f"solves inside without feedback={inner.config.feedback!r}: leave `backend` out"
        nets = {name: as_net(net, name) for name, net in inner.nets().items()}
        if not all(isinstance(net, Net) for net in nets.values()):
            return "cannot look inside the model's nets"
        return Reasoner(
            inner.schedule, nets, inner.cos_sin(), inner.variant.output,  # type: ignore[arg-type]
            {name: fresh[name] for name in inner.schedule.states},
            lambda batch: inner.embed(batch["inputs"], batch["puzzle_identifiers"], training=False),
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
        {name: as_net(getattr(inner, attribute), name, plan.rope) for name, attribute in plan.nets},  # type: ignore[misc]
        inner.rotary_emb() if plan.rope else None,
        plan.output,
        start,
        lambda batch: inner._input_embeddings(batch["inputs"], batch["puzzle_identifiers"]).to(
            start[plan.output].dtype
        ),
        *heads, inner.puzzle_emb_len, q_learning,
    )  # fmt: skip
