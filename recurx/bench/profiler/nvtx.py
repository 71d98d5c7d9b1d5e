"""NVTX ranges for Nsight: step, net call, block and stage, by module hooks alone.

No operator is watched, so a step runs at its own speed; stages that only the order of operators
tells (RoPE, attention, norm) lie in the range of their module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from recurx.bench.profiler.attribute import STAGES
from recurx.bench.profiler.records import Where
from recurx.bench.profiler.roles import roles_of
from recurx.errors import bad_argument

_NAMES = {"inner": "supervision step", "self_attn": "RoPE, attention", "act": "ACT wrapper"}


@contextlib.contextmanager
def nvtx_ranges(
    model: nn.Module,
    push: Callable[[str], Any] | None = None,
    pop: Callable[[], Any] | None = None,
) -> Iterator[None]:
    """Inside the block, every known module of `model` pushes an NVTX range around its forward.

    Args:
        push, pop: what opens and closes a range; None for torch.cuda.nvtx. The block is then also
            what `nsys -c cudaProfilerApi` records: it waits for the device before it ends.

    Raises:
        InvalidArgument: without `push` and `pop`, this PyTorch has no CUDA.
    """
    recorded: Any = contextlib.nullcontext()
    if push is None or pop is None:
        if not torch.cuda.is_available():
            raise bad_argument(
                "profile", "push", "functions, since there is no CUDA device here", None,
                "NVTX ranges are for Nsight on a GPU.",
            )  # fmt: skip
        push, pop = torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop
        recorded = _recorded()
    roles, calls = roles_of(model), [0]
    open_range, close_range = push, pop

    def enter(module: nn.Module, args: Any) -> None:
        role = roles.of.get(id(module))
        if role is None:
            return
        if role.part == "inner":
            calls[0] = 0
        open_range(_label(role, calls[0]))
        calls[0] += role.part in ("net", "foreign")

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in roles.of:
            close_range()

    handles = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    ]
    try:
        with recorded:
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _recorded() -> Iterator[None]:
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():  # cudaProfilerStart and Stop
        try:
            yield
        finally:
            torch.cuda.synchronize()


def _label(role: Where, call: int) -> str:
    if role.part in ("net", "foreign"):
        return f"call {call}: net {role.name}"
    if role.part == "block":
        return f"block {role.block}"
    if role.part in ("io", "module"):
        return role.name
    return _NAMES.get(role.part) or STAGES.get(role.part, ("", role.part))[1]
