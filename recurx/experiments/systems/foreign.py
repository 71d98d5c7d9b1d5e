"""Networks of other layouts as nets: read by their names, proved by a probe, watched at each call.

What `recurx.proof` does for stacks of blocks, for modules whose layers are built otherwise. A
reader says which block a part is and which parameters are its weights (`Layout`); the probe shows
whether that is so; the guard of `recurx.readings` tells at every call whether it still is. The
reader says everything that is there: a parameter that no slot takes, or a buffer, is a difference.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recurx import reference
from recurx.nets import Net, rope_tables
from recurx.operands import CosSin
from recurx.probing import MOST_KNOWN, SCALES, TOKENS, aside, off, random_state
from recurx.readings import Reading, attends
from recurx.specs import NetSpec
from recurx.survey import Survey, foreign_hooks, foreign_mode

Call = Callable[[Any, Tensor, CosSin | None], Tensor]  # the module's own code on h


class Unspelled(Exception):
    """What of a module has no spelling, in a clause."""


class Slot(NamedTuple):
    """How a weight of a net is made of parameters.

    Args:
        paths: dotted, of parameters of which the rows follow each other; none of a weight that is
            made outside of the module: the caller of `net_of` puts it there, and a probe `plus`.
        plus: is added (a norm whose weight is kept as its distance from 1).
        masks: paths of buffers that they are multiplied by in training, one each, or none.
    """

    paths: tuple[str, ...]
    plus: float = 0.0
    masks: tuple[str, ...] = ()


class Layout(NamedTuple):
    """Blocks, and of each weight in their flat order where it lies."""

    spec: NetSpec
    slots: tuple[Slot, ...]


Reader = Callable[[Any], Layout | None]  # None: another layout; raises Unspelled


def layout_of(blocks: list[tuple[Any, Mapping[str, Slot]]]) -> Layout:
    """The layout of blocks with the slots of each by name; all of them, and no other."""
    slots: list[Slot] = []
    for number, (block, own) in enumerate(blocks):
        names = [name for name, _ in block.slots]
        if set(names) != own.keys():
            odd = ", ".join(sorted(set(names) ^ own.keys()))
            raise Unspelled(f"block {number} has weights apart from its others: {odd}")
        slots += [own[name] for name in names]
    return Layout(NetSpec(tuple(block for block, _ in blocks)), tuple(slots))


class _Known(NamedTuple):
    """What was found as long as the guard of the reading sees no change; a refusal too."""

    found: Layout | str
    reading: Reading
    rope: bool


_kept: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()
_probed: dict[Any, tuple[str, Any]] = {}  # by signature: what the probe said


def net_of(
    module: Any, where: str, reader: Reader, call: Call, rope: bool = False
) -> Net | str | None:
    """The net that a module is, or what keeps it from being one; None: of another layout.

    Args:
        module: any; it is proved when it is first seen, and again after a change.
        where: its name, for messages.
        reader: gives its layout.
        call: calls it with h [B, T, D] and rotary tables or None.
        rope: whether it is called with tables.
    """
    if not isinstance(module, nn.Module):
        return None
    known = _kept.get(module)
    known = known if known is None or known.rope == rope else None
    held = None if known is None else known.reading.weights(module)
    if known is None or held is None:
        examined = _examined(module, where, reader, call, rope)
        if not isinstance(examined, _Known):
            return examined
        if known is not None:  # the other mode (training or not) stays known too
            examined.reading.take(module, known.reading)
        known, held = examined, examined.reading.weights(module)
        if held is not None:  # else the guard cannot tell when a hook, say, is gone again
            _kept[module] = known
    if isinstance(known.found, str):
        return known.found
    if held is None:
        return "it changes while it is looked at"
    return _net(known.found, held, module.training)


def _net(layout: Layout, held: list[Tensor], training: bool) -> Net:
    """The net whose parameters, and then masks, are `held`."""
    given = iter(held)
    shapes = [shape for block in layout.spec.blocks for _, shape in block.slots]
    weights = []
    for slot, shape in zip(layout.slots, shapes, strict=True):
        if not slot.paths:
            weights.append(held[0].new_full(shape, slot.plus))
            continue
        parts = [next(given) for _ in slot.paths]
        masks = [next(given) for _ in slot.masks]
        if training and masks:
            parts = [part * mask for part, mask in zip(parts, masks, strict=True)]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts)
        weight = weight + slot.plus if slot.plus else weight
        weights.append(weight if weight.shape == shape else weight.view(shape))
    return Net(layout.spec, weights)


def _examined(
    module: nn.Module, where: str, reader: Reader, call: Call, rope: bool
) -> _Known | str | None:
    try:
        layout = reader(module)
    except Unspelled as error:
        return str(error)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        return f"it cannot be read: {type(error).__name__}: {error}"
    if layout is None:
        return None
    tensors = [*module.parameters(), *module.buffers()]
    if any(t.is_meta or type(t) not in (nn.Parameter, Tensor) for t in tensors):
        return "its weights are on the meta device, or of a class of their own"
    reading, held = _read(module, layout, where)
    reading.spec, reading.shapes = layout.spec, tuple(t.shape for t in held)
    reading.take(module, None)
    if said := reading.differences:
        more = f"; and {len(said) - 3} more of the kind" if len(said) > 3 else ""
        return _Known("; ".join(said[:3]) + more, reading, rope)
    key = reading.signature, layout, rope, tensors[0].device.type
    if key not in _probed:
        if len(_probed) >= MOST_KNOWN:
            _probed.clear()
        with aside(tensors[0].device):
            _probed[key] = _differs(module, layout, call, rope), reading.kept
    return _Known(_probed[key][0] or layout, reading, rope)


def _read(module: nn.Module, layout: Layout, where: str = "") -> tuple[Reading, list[Tensor]]:
    """All that its code can see, and the parameters and masks in the order of the slots."""
    taken = [path for slot in layout.slots for path in (*slot.paths, *slot.masks)]
    masks = {path for slot in layout.slots for path in slot.masks}

    def walk(survey: Survey, module: Any) -> None:
        survey.signature += survey.names.look(vars(nn.Module), ("__call__", "_call_impl"), {})
        if foreign_hooks():
            survey.differs("", "is called under global module hooks, which would no longer run")
        if mode := foreign_mode():
            survey.differs("", f"is called under a {mode}, which would not see its operators")
        for path, part in module.named_modules():
            inside = f"{path}.".lstrip(".")
            named = [n for n in part._parameters if f"{inside}{n}" in taken]
            named += [n for n, held in part._parameters.items() if held is None]
            buffers = tuple(n for n in part._buffers if f"{inside}{n}" in masks)
            survey.module(path, part, tuple(part._modules), tuple(named), buffers)

    reading = Reading(module, where, walk)
    reading.plain = True  # masks are read as the weights are, and other buffers are a difference
    for path in taken:
        outer, _, name = path.rpartition(".")
        part = module.get_submodule(outer)
        reading._weights.append((part._buffers if path in masks else part._parameters, name))
    return reading, [held[name] for held, name in reading._weights]


def _differs(module: nn.Module, layout: Layout, call: Call, rope: bool) -> str:
    """What its own code on random weights does that the blocks do not; "" if nothing."""
    generator = torch.Generator().manual_seed(0)
    try:
        own = copy.deepcopy(module).float()
        for part, weight in _owned(own):
            values = torch.empty(weight.shape, device="cpu").uniform_(
                -1.7, 1.7, generator=generator
            )
            rows = torch.linspace(-1, 1, len(values), device="cpu")
            values *= 4 ** rows.view(-1, *[1] * (values.ndim - 1)) / values[0].numel() ** 0.5
            with torch.no_grad():
                weight.copy_(values.abs() if part == "mask" else values)
        reading, _ = _read(own, layout)
        for training in (True, False):
            own.train(training)
            net = _net(layout, [held[name] for held, name in reading._weights], training)
            for grad in (True, False):
                if said := _run_differs(own, net, call, rope, grad):
                    return f"{said} in {'training' if training else 'evaluation'} mode"
        if _read(own, layout)[0].signature != reading.signature:
            return "its forward changes its attributes"
    except Exception as error:  # anything may be wrong with code that we do not know
        return f"its forward fails in a probe with {type(error).__name__}: {error}"
    return ""


def _owned(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for part in module.modules():
        yield from (("weight", p) for p in part._parameters.values() if p is not None)
        yield from (("mask", b) for b in part._buffers.values() if b is not None)


def _run_differs(own: nn.Module, net: Net, call: Call, rope: bool, grad: bool) -> str | None:
    tokens = max(block.tokens for block in net.spec.blocks) or TOKENS[0 if grad else 1]
    generator, device = torch.Generator().manual_seed(int(grad)), net.weights[0].device
    how: Any = {"generator": generator, "device": "cpu"}
    scale = torch.tensor(SCALES, device="cpu").view(-1, 1, 1)
    drawn = torch.randn(2, len(SCALES), tokens, net.spec.hidden, **how)
    h, weight = (drawn * scale).to(device).requires_grad_(grad)[0], drawn[1].to(device)
    head = next((block.head_dim for block in net.spec.blocks if block.head_dim), 0)
    turns = rope and attends(net.spec)
    tables = rope_tables(tokens, head, base=500.0, device=device) if turns else None
    leaves = [h, *(p for p in own.parameters() if p.requires_grad)]

    def run(run_net: Callable[[], Tensor]) -> list[Tensor]:
        with torch.set_grad_enabled(grad):
            out = run_net()
        if not grad:
            return [out]
        return [out, *torch.autograd.grad((out * weight).sum(), leaves, materialize_grads=True,
                                          retain_graph=True)]  # fmt: skip

    before = random_state(device)
    got = run(lambda: call(own, h, tables))
    if random_state(device) != before:
        return "it draws random numbers"
    want = run(lambda: reference.call(h, net, tables))
    names = ["its output", "its gradient of the input"]
    names += [f"its gradient of `{name}`" for name, p in own.named_parameters() if p.requires_grad]
    # The gradient of what a norm takes away again (a bias before a layer norm) is rounding alone.
    floors = [1e-30, *[0.01 * max(float(g.norm()) for g in want[1:])] * len(leaves)] if grad else []
    return next(filter(None, map(off, names, got, want, floors or [1e-30])), None)
