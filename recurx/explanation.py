"""`recurx.explain`: which backend runs a recursion, which were refused and why, what runs where."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from recurx import fp8
from recurx.backends.cpu import BACKEND as CPU
from recurx.errors import BackendUnavailable, UnsupportedModel, bad_argument
from recurx.models.inner import Inner, problem_of_model
from recurx.nets import Net, is_block_stack
from recurx.patching import sharded
from recurx.patching.handle import PatchHandle, installed
from recurx.patching.install import find
from recurx.plan import Device
from recurx.problem import Problem
from recurx.proof import as_net, examine
from recurx.route import Request, refusals, route


def explain(model_or_problem: Any, *, backend: str | None = None, batch_size: int = 1) -> str:
    """Say which backend runs it, which were refused and why, and which calls run where.

    Args:
        model_or_problem: a `recurx.Problem`; a `TRM` or `HRM`; official or lucidrains code,
            patched or not, wrapped in whatever; or a handle of `recurx.patch`.
        backend: the backend asked for; None for that of the model, or "auto".
        batch_size: B of the recursion that is explained (not used for a Problem).

    Returns:
        Several lines of text.

    Raises:
        InvalidArgument: none of these things.
    """
    if isinstance(model_or_problem, Problem):
        return _explain_problem(model_or_problem, backend or "auto")
    if isinstance(model_or_problem, PatchHandle):
        parts = [str(model_or_problem.report)]
        parts += [_explain_module(m, backend, batch_size) for m in model_or_problem.modules]
        return "\n\n".join(parts)
    if isinstance(model_or_problem, nn.Module):
        return _explain_module(model_or_problem, backend, batch_size)
    raise bad_argument(
        "explain", "model_or_problem", "a Problem, a torch module or a patch handle",
        type(model_or_problem).__name__,
    )  # fmt: skip


def _explain_module(model: nn.Module, backend: str | None, batch_size: int) -> str:
    own = [(name, m) for name, m in model.named_modules() if isinstance(m, Inner)]
    parts = []
    for name, inner in own:
        try:
            problem, asked = problem_of_model(inner, batch_size), backend or inner.backend
            text = _explain_problem(problem, asked, both=True) + _int8_note(inner)
        except UnsupportedModel as error:  # no longer what its weights tell
            text = f"  {error}"
        parts.append(f"{_title(name, inner)}: recurx's own model\n{text}")
    for name, module, adapter in find(model):
        if isinstance(module, Inner):
            continue
        function: Any = installed(module, adapter.method)
        module = sharded.stand_in(module) if sharded.is_sharded(module) else module
        said = "not patched, runs on PyTorch. After recurx.patch(model):"
        lines = adapter.differences(module)
        if lines:
            said, text = "runs on PyTorch; recurx.patch would refuse it:", []
            if function is not None:
                said = "patched, but its code changed; it runs on PyTorch as it is:"
                lines.append("call handle.refresh() after a change of the model's code")
        else:
            recipe = function and function.recurx_recipe
            recipe = recipe or adapter.recipe(module, backend or "auto")
            if function is not None:
                said, lines = "patched", adapter.describe(module, recipe)
            problem = dataclasses.replace(adapter.problem(module, recipe), batch=batch_size)
            text = [_explain_problem(problem, backend or recipe.backend, both=True)]
        lines = [f"{_title(name, module)}: {said}", *(f"  {line}" for line in lines), *text]
        parts.append("\n".join(lines))
    if not parts and is_block_stack(model):
        why = examine(model, "").difference or "it may run fused, as a net of recurx.recurse"
        return f"{type(model).__name__}, a stack of blocks: {why}."
    if not parts:
        return (
            f"{type(model).__name__}: no recursion that recurx knows in this module; "
            "it runs on PyTorch."
        )
    return "\n\n".join(parts)


def _int8_note(inner: Inner) -> str:
    """How backend cpu runs what `recurx.quantize` made, as a further line."""
    nets = [as_net(net, name) for name, net in inner.nets().items()]
    if not all(isinstance(net, Net) and fp8.have_codes(net.weights, fp8.INT8) for net in nets):
        return ""
    slow = CPU.why_unavailable() or CPU.why_not_int8()
    how = f"at no gain: it {slow}" if slow else "by vpdpbusd, where the weights are as made"
    return f"\n  quantised to int8: backend cpu multiplies int8, {how}"


def _title(name: str, module: nn.Module) -> str:
    return f"{name} ({type(module).__name__})" if name else type(module).__name__


def _explain_problem(problem: Problem, asked: str, both: bool = False) -> str:
    """`both` explains evaluation and training, else what `problem.needs_grad` says."""
    forward = dataclasses.replace(problem, needs_grad=False)
    try:
        found = route(forward if both else problem, None, Request(asked))
    except BackendUnavailable as error:
        return "\n".join([str(problem), f"  {error}", *refusals(forward)])
    text = str(found)
    if both:
        text += f"\n  {route(forward, None, Request(asked, grad=True)).sentence}"
    return text + _device_note(problem.device_type)


def _device_note(kind: str) -> str:
    """What the plans do not say of the device and of this moment, as further lines."""
    text = ""
    if kind == "cuda" and torch.cuda.is_available() and Device.of(kind).guess:
        text += f"\n  rates of {Device.of(kind).name}: {Device.of(kind).source}"
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.float16:
        text += "\n  under this autocast in float16 PyTorch runs it, as no fused backend does"
    return text
