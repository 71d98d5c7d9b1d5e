"""Which module plays which part: the map from a model's modules to the domain of the profile.

Modules are found by the adapters of `recurx.patch` and by the attribute names that all official
code shares (`L_level.layers.N.self_attn.qkv_proj`, ...). What a module does itself, outside its
children, is resolved later from the order of its operators (see `attribute.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from recurx.bench.profiler.records import Where
from recurx.nets import is_block_stack
from recurx.patching.install import find

# Attribute path below a block -> part. `self_attn` and the MLPs themselves hold what lies between
# their products: rotary embedding and attention, or the gate's activation.
BLOCK_PARTS = {
    "self_attn": "self_attn",
    "self_attn.qkv_proj": "qkv",
    "self_attn.o_proj": "o",
    "mlp": "swiglu",
    "mlp.gate_up_proj": "gate_up",
    "mlp.down_proj": "down",
    "mlp_t": "t_swiglu",
    "mlp_t.gate_up_proj": "t_gate_up",
    "mlp_t.down_proj": "t_down",
}
HEADS = ("lm_head", "q_head")
_NETS = re.compile(r"([LH])_level")
_OTHER_NETS = {"network": "net", "lenet": "L"}  # lucidrains' and nano-trm's
_TABLES = re.compile(r"(^|[._])(cos|sin)")


@dataclass
class Roles:
    """Roles by module (places without recursion and call), and what else the trace needs to know
    of the model."""

    of: dict[int, Where] = field(default_factory=dict)
    tables: set[int] = field(default_factory=set)  # storage addresses of rotary tables
    cycle: int = 0  # net calls of one cycle, 0 if unknown
    attentions: list[nn.Module] = field(default_factory=list)


def roles_of(model: nn.Module) -> Roles:
    """Find the recursion in `model` and name the parts of every module around and inside it."""
    roles = Roles()
    found = find(model)
    for path, inner, _ in found:
        _name_inner(roles, inner)
        part = "act"
        while path:  # the modules around it, innermost first
            path = path.rpartition(".")[0]
            roles.of.setdefault(id(model.get_submodule(path)), Where(part))
            part = "loss"
    if not found:
        for name, child in model.named_children():
            roles.of[id(child)] = Where("module", name)
    for name, buffer in model.named_buffers():
        if _TABLES.search(name):
            roles.tables.add(buffer.untyped_storage().data_ptr())
    return roles


def _name_inner(roles: Roles, inner: nn.Module) -> None:
    roles.of[id(inner)] = Where("inner")
    for attribute, child in inner.named_children():
        net = _NETS.fullmatch(attribute)
        if net or attribute in _OTHER_NETS:
            _name_net(roles, child, net[1] if net else _OTHER_NETS[attribute])
        elif attribute in HEADS:
            roles.of[id(child)] = Where(attribute)
        else:
            roles.of[id(child)] = Where("io", attribute)
    roles.cycle = _calls_of_a_cycle(inner)


def _name_net(roles: Roles, net: Any, name: str) -> None:
    if not is_block_stack(net):
        roles.of[id(net)] = Where("foreign", name)
        return
    roles.of[id(net)] = Where("net", name)
    for number, block in enumerate(net.layers):
        roles.of[id(block)] = Where("block", name, block=number)
        for path, part in BLOCK_PARTS.items():
            child: Any = block
            for attribute in path.split("."):
                child = getattr(child, attribute, None)
            if isinstance(child, nn.Module):
                roles.of[id(child)] = Where(part, name, block=number)
                if part == "self_attn":
                    roles.attentions.append(child)


def _calls_of_a_cycle(inner: Any) -> int:
    """Net calls of one cycle, by the configuration; 0 where it does not say."""
    settings = getattr(inner, "config", getattr(inner, "hparams", None))
    inside = getattr(settings, "L_cycles", None)
    if inside is None:
        inside = getattr(inner, "num_latent_refinements", None)
    return inside + 1 if isinstance(inside, int) else 0
