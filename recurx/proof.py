"""Whether a module computes what `recurx.reference` says of its weights: proved, not guessed.

    proof = examine(module, rope=True)
    proof.net            # its sizes and weights, if it may run fused
    proof.difference     # else: which layer, what differs

First the structure: nothing may be there that the block does not read (recurx/readings.py). Then a
probe: its own forward and gradients on random data and random weights, in training and evaluation,
against the reference; it may draw no random numbers and change nothing. Code that passed once is
known by its signature, so that a second model of the same code is not probed. What cannot be proved
runs as the code it is (`OwnForward`), on PyTorch, or is refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from recurx.errors import InvalidArgument, UnsupportedModel, bad_argument
from recurx.lowrank import merged
from recurx.nets import (
    Net,
    NetSpec,
    Unreadable,
    by_attributes,
    is_block_stack,
    layers_of,
    read_layer,
    read_stack,
    spelled,
    weights_at,
)
from recurx.operands import CosSin
from recurx.own_code import OwnForward, style_of
from recurx.probing import probed
from recurx.readings import Reading, attends, read, remember
from recurx.survey import HOOKS, INTERNAL


class Proof(NamedTuple):
    """A net if it is proved, else what differs, with the layer's name."""

    net: Net | None
    difference: str | None


def as_net(module: Any, where: str = "?", cos_sin: CosSin | bool | None = None) -> Any:
    """A `Net` of a proved module; `OwnForward` of another one; any other callable as it is.

    Args:
        module: a `Net`, a stack of blocks under the official names, or a callable h -> h.
        where: its name, for messages.
        cos_sin: the rotary tables that it is called with; True for some.

    Raises:
        InvalidArgument: it is none of these, or its weights have impossible shapes.
    """
    found = proved(module, where, cos_sin)
    if not isinstance(found, str):
        return found
    difference = found
    if by_attributes(module) or style_of(module) is None:
        raise UnsupportedModel(
            f"recurx.recurse: nets[{where!r}] is not the net that its weights tell: {difference}. "
            "Take that out, or pass `lambda h: net(h)`, with your own code for the net, which "
            "runs on PyTorch."
        )
    return OwnForward(module, difference, None if isinstance(cos_sin, bool) else cos_sin)


def proved(module: Any, where: str = "?", cos_sin: CosSin | bool | None = None) -> Any:
    """As `as_net`, but of a stack that is not proved what differs, as a string."""
    if isinstance(module, Net):
        return module
    module = without_compile(module)
    rope = cos_sin is not None and cos_sin is not False
    if not torch.compiler.is_compiling():
        found = read(module, rope)
        if found is not None:
            return Net.trusted(*found)
    if not is_block_stack(module):
        if hasattr(module, "layers") and rope and style_of(module):
            return "its layers are no blocks with (self_attn | mlp_t) and mlp"
        if callable(module):
            return module
        raise bad_argument(
            "recurse", f"nets[{where!r}]",
            "a recurx.Net, a stack of TRM/HRM blocks, or a callable [B, T, D] -> [B, T, D]",
            type(module).__name__,
        )  # fmt: skip
    if not torch.compiler.is_compiling():
        proof = examine(module, where, rope)
        return proof.difference if proof.net is None else proof.net
    if isinstance(why := merged(module, where), str):
        return why
    known = known_blocks(module, where, rope)
    watch_traced(module, attribute_names(module))
    if isinstance(known, str):
        return known
    spec = NetSpec.from_key(known[0])  # while tracing: a spec that comes from outside has no fields
    return Net.trusted(spec, weights_at(module, spec, known[1]))


def examine(module: Any, where: str = "?", rope: bool = True) -> Proof:
    """Prove a stack of blocks, or say what differs; what is proved is remembered and guarded.

    Args:
        module: under the official attribute names, `recurx.nets.is_block_stack`.
        rope: whether it will be called with rotary tables.

    Raises:
        InvalidArgument: code of ours with weights of impossible shapes.
    """
    module = merged(module, where)
    if isinstance(module, str):
        return Proof(None, module)
    reading, code_is_ours = Reading(module, where), by_attributes(module)
    if reading.differences:
        return Proof(None, "; ".join(reading.differences))
    try:
        net = read_stack(module, where)
    except (InvalidArgument, Unreadable, AttributeError, KeyError, TypeError) as error:
        if code_is_ours:
            raise
        return Proof(None, str(error))
    if code_is_ours:
        reading.proved |= {True, False}
    elif net.weights[0].is_meta:
        # nothing to run, and nothing that a probe could be wrong about yet
        return Proof(net, None)
    else:
        said = probed(module, net.spec, reading, rope and attends(net.spec))
        if isinstance(said, str):
            return Proof(None, said)
        net.spec = spelled(net.spec, said)
        reading.proved |= {rope} if attends(net.spec) else {True, False}
    reading.bind(net.spec)
    remember(module, reading)
    return Proof(net, None)


def known_blocks(module: Any, where: str, rope: bool) -> Any:
    """`examine` while torch.compile traces, which runs it aside: the blocks and where their weights
    lie, or what differs."""
    net, difference = examine(module, where, rope)
    if net is None:
        return difference
    return net.spec.key, tuple(read_layer(layer).paths for layer in layers_of(module))


def attribute_names(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Plain attributes of every module, as `watch_traced` reads them."""
    return tuple(tuple(name for name in vars(m) if name not in INTERNAL) for m in module.modules())


known_blocks._dynamo_marked_constant = True  # type: ignore[attr-defined]
attribute_names._dynamo_marked_constant = True  # type: ignore[attr-defined]


def watch_traced(module: nn.Module, names: tuple[tuple[str, ...], ...]) -> int:
    """Look at what the proof rests on, so that torch.compile guards it, but for hooks, which it
    never looks at again."""
    found = 0
    for m, own in zip(module.modules(), names, strict=True):
        found += len(m._parameters) + len(m._modules) + ("forward" in m.__dict__)
        for name in own:
            found += getattr(m, name) is None
    return found


def without_compile(module: Any) -> Any:
    """The module in the plain wrapper of `torch.compile(module)`: the same code and weights."""
    inside = module._modules.get("_orig_mod") if isinstance(module, nn.Module) else None
    if inside is None or any(getattr(module, name) for name in HOOKS):
        return module
    return inside
