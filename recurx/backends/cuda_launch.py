"""From recurx's values to the C interface: what a launch is told beside addresses."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from recurx.backends import cuda_abi as abi
from recurx.backends import cuda_grid
from recurx.errors import bad_argument
from recurx.nets import ATTENTION, WEIGHT_NAMES, NetSpec
from recurx.operands import Operands, Span
from recurx.plan.launch import LaunchPlan
from recurx.problem import Problem
from recurx.program import PLAIN, lower
from recurx.reference import ACTIVATIONS
from recurx.schedule import INPUT


class Launch(NamedTuple):
    """The C entry that runs or solves by a plan, its struct, and the bytes of scratch it needs."""

    entry: str
    settings: ctypes.Structure
    scratch_bytes: int

    @classmethod
    def of(
        cls, library: abi.Library, plan: LaunchPlan, p: abi.RxRecursion, what: str = "run"
    ) -> Launch:
        """How `library` runs `plan`; of `p` only the sizes count."""
        family, settings = abi.FAMILIES[plan.kind], _settings(plan)
        size = library.bytes_of(f"rx_{family}_scratch_bytes", p, settings)
        return cls(f"rx_{family}_{what}", settings, size)


def _settings(plan: LaunchPlan) -> ctypes.Structure:
    if plan.kind == "grid":
        return cuda_grid.settings(plan)
    if plan.kind == "cluster":
        return abi.RxClusterPlan(plan["cluster"])
    return abi.RxOwnerPlan(*(plan[name] for name, _ in abi.RxOwnerPlan._fields_))


def check_inputs(problem: Problem, operands: Operands) -> None:
    """Everything a kernel takes on trust: number of states, shapes, dtype, one device.

    Raises:
        InvalidArgument: one of them is not as `problem` says.
    """
    tensors, device = (operands.x, *operands.states), operands.x.device
    shape = (problem.batch, problem.tokens, problem.hidden)
    if len(tensors) != len(problem.schedule.states) + 1:
        raise bad_argument(
            "recurse", "carry", f"{len(problem.schedule.states)} states", len(operands.states)
        )
    for name, tensor in zip((INPUT, *problem.schedule.states), tensors, strict=True):
        if tensor.shape != shape or tensor.dtype is not torch.bfloat16:
            got = f"{tensor.dtype} {list(tensor.shape)}"
            raise bad_argument("recurse", name, f"bfloat16 {list(shape)}", got)
        if tensor.device != device:
            got = f"one on {tensor.device}"
            raise bad_argument("recurse", name, f"a tensor on {device}", got)


def describe(problem: Problem, span: Span) -> abi.RxRecursion:
    """The RxRecursion of the calls of `span` without any address."""
    p = abi.RxRecursion(
        problem.batch, problem.tokens, problem.hidden, len(problem.schedule.states),
        len(problem.nets), span.stop - span.start,
    )  # fmt: skip
    for net, (_, spec) in zip(p.nets, problem.nets, strict=False):
        net.num_blocks = len(spec.blocks)
        net.blocks[: len(spec.blocks)] = blocks(spec)
    return p


def blocks(spec: NetSpec) -> list[abi.RxBlock]:
    """The blocks of a net as structs."""
    return [
        abi.RxBlock(
            block.kind != ATTENTION, block.inner, block.num_heads, block.token_inner, block.eps,
            block.residual_scale, list(ACTIVATIONS).index(block.activation), block.kv_heads,
            sum(1 << k for k, n in enumerate(WEIGHT_NAMES[block.kind]) if n in block.biases),
        )
        for block in spec.blocks
    ]  # fmt: skip


def call_words(problem: Problem, span: Span) -> tuple[int, ...]:
    """The calls of `span` as the int32 words of RxCall."""
    program = lower(problem.schedule, span)
    order = [name for name, _ in problem.nets]
    words: list[int] = []
    for call in program.calls:
        # States count from 0 there, and x comes last.
        write, *reads = (
            (slot - 1) % (program.states + 1) for slot in (call.write, *call.state, *call.inject)
        )
        shared = abi.SUM_FORMED if call.forms else abi.SUM_KEPT
        c = abi.RxCall(
            order.index(call.net), write, len(call.state), len(call.inject),
            abi.SUM_OWN if call.shared is None else shared, call.stays,
        )  # fmt: skip
        c.state[: c.num_state] = reads[: c.num_state]
        c.inject[: c.num_inject] = reads[c.num_state :]
        c.scale, c.keep, c.damping, c.noise, c.number = (call.factors or PLAIN)[:5]
        words += (ctypes.c_int32 * (ctypes.sizeof(c) // 4)).from_buffer(c)
    return tuple(words)
