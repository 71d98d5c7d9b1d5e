"""FSDP2: a fused recursion over nets whose weights `fully_shard` keeps apart.

Outside its forward a sharded block holds pieces of its weights (DTensors); hooks around the forward
gather them, and scatter gradients in the backward. The recursion reads the weights of all blocks at
once and calls none. So it runs inside the forward of every sharded block, one inside the other:
each block's own hooks gather once for all the net calls, and scatter once.
"""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recurx.api import recurse
from recurx.lowrank import twin
from recurx.nets import Net
from recurx.operands import CosSin
from recurx.proof import proved
from recurx.schedule import INPUT, Schedule
from recurx.survey import HOOKS

Values = dict[str, Tensor]


def _fsdp() -> Any:
    """The class of sharded modules; None where nobody imported it."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def nets_of(recipe: Any, modules: Mapping[str, Any], tables: CosSin | None) -> Any:
    """{net: what runs it} for the nets of a patched model: proved nets, or sharded modules, whose
    proof waits until their weights are gathered. A str: why the model's own code has to run."""
    sharded: list[Any] = sharded_in(modules.values())
    for module in sharded:
        policy = getattr(module._get_fsdp_state(), "_mp_policy", None)
        if policy is None or policy.param_dtype is not None or policy.output_dtype is not None:
            return "FSDP's mixed precision rounds what enters and leaves each of its blocks"
    if sharded:
        return modules
    found, attributes = {}, dict(recipe.nets)
    for name, module in modules.items():
        net = proved(module, attributes[name], tables)
        if not isinstance(net, Net):
            return net if isinstance(net, str) else f"`{attributes[name]}` is no stack now"
        spread = "torch.distributed.tensor" in sys.modules
        if spread and any(hasattr(weight, "placements") for weight in net.weights):
            return f"the weights of `{attributes[name]}` are pieces (tensor parallelism)"
        found[name] = net
    return found


def run_recursion(
    recipe: Any,
    schedule: Schedule,
    nets: Mapping[str, Any],
    x: Tensor,
    carried: Mapping[str, Tensor],
    tables: CosSin | None,
) -> Values | str:
    """The states after a recursion over what `nets_of` found; or why its own code has to run."""
    late = set(carried) - {step.write for step in schedule.steps[: schedule.grad_from]}
    entering = schedule.detach_carry and torch.is_grad_enabled()
    if entering and any(carried[name].requires_grad for name in late):
        return "gradient flows into the states that enter it"
    # `model.half()`, say, leaves x and states apart; their sums have one dtype.
    dtype = functools.reduce(torch.promote_types, [z.dtype for z in carried.values()], x.dtype)
    values = {INPUT: x.to(dtype), **{name: z.to(dtype) for name, z in carried.items()}}
    sharded = sharded_in(net for net in nets.values() if isinstance(net, nn.Module))
    refused: list[str] = []

    def run(values: Values) -> Values:
        bound = nets
        if sharded:
            bound = nets_of(recipe, {name: unwrapped(net) for name, net in nets.items()}, tables)
        if isinstance(bound, str):
            refused.append(bound)
            return {}
        x, states = values[INPUT], {name: values[name] for name in carried}
        how: Any = {"backend": recipe.backend, "cos_sin": tables, "save": recipe.save}
        return recurse(schedule, bound, x, states, **how)

    found = inside(sharded, run, values)
    return refused[0] if refused else found


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 keeps weights of `module`, by itself or by a module around it."""
    pieces = any(hasattr(parameter, "placements") for parameter in module.parameters())
    return pieces or bool(sharded_in([module]))


def sharded_in(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules that FSDP2 wraps in these trees, outer ones first."""
    kind = None if torch.compiler.is_compiling() else _fsdp()
    if kind is None:
        return []
    return list(dict.fromkeys(m for top in modules for m in top.modules() if isinstance(m, kind)))


def inside(modules: list[nn.Module], run: Callable[[Values], Values], values: Values) -> Values:
    """`run(values)` inside the forward of every one of `modules`, so that their hooks run."""
    if not modules:
        return run(values)
    module: Any = modules[0]
    before = vars(module).get("forward")
    module.forward = lambda given: inside(modules[1:], run, given)
    try:
        found: Values = module(values)
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
    return found


def unwrapped(module: nn.Module, weight: Callable[[Tensor], Tensor] = lambda w: w) -> Any:
    """A twin of `module` as it was before `fully_shard`: its class, children and attributes, no
    hooks of FSDP; each parameter is what `weight` makes of it."""
    kind, cls = _fsdp(), type(module)
    if kind is not None and isinstance(module, kind):
        cls = cls.__mro__[cls.__mro__.index(kind) + 1]
    children = {name: m and unwrapped(m, weight) for name, m in module._modules.items()}
    made = twin(module, cls, children, {n: p if p is None else weight(p)
                                        for n, p in module._parameters.items()})  # fmt: skip
    own = vars(made)
    for name in HOOKS:
        own[name] = OrderedDict((k, h) for k, h in own[name].items() if not _of_fsdp(h))
    if getattr(own.get("forward"), "__module__", None) == __name__:
        del own["forward"]  # that of `inside`
    for name in [name for name in own if name.startswith("__composable_api")]:
        del own[name]  # fully_shard's own notes
    return made


def stand_in(module: nn.Module) -> Any:
    """A twin of a module that FSDP2 wraps, with random weights of full size, for a probe."""
    generator = torch.Generator().manual_seed(0)

    def weight(sharded: Tensor) -> Tensor:
        values = torch.randn(sharded.shape, generator=generator, device="cpu")
        values *= max(1, sharded.shape[-1] if sharded.ndim else 1) ** -0.5
        return nn.Parameter(values.to(sharded.device, sharded.dtype), sharded.requires_grad)

    return unwrapped(module, weight)


def _of_fsdp(hook: Any) -> bool:
    owner = getattr(hook, "__self__", None)
    return type(owner).__module__.startswith("torch.distributed.fsdp")
