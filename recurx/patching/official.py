"""Official TRM, single-z, hier6 and HRM code: `inner.forward` with its recursion on recurx.

Input embeddings, heads and everything around `inner` stay the model's own code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recurx.api import recurse
from recurx.errors import InvalidArgument, RecurxError
from recurx.models.inner import Inner
from recurx.nets import ATTENTION, Net, NetSpec, as_net, is_block_stack
from recurx.patching.adapter import Recipe, signature_difference
from recurx.patching.probe import probe_forward
from recurx.problem import Problem
from recurx.schedule import Schedule

_ATTENTION = {"self_attn.qkv_proj.weight", "self_attn.o_proj.weight"}
_TOKEN_MLP = {"mlp_t.gate_up_proj.weight", "mlp_t.down_proj.weight"}
_MLP = {"mlp.gate_up_proj.weight", "mlp.down_proj.weight"}


@dataclass(frozen=True, kw_only=True)
class OfficialRecipe(Recipe):
    """How one `inner` maps onto a schedule.

    Args:
        states: (state, attribute of the carry), in the order of the schedule.
        nets: (net, attribute of the module).
        output: the state that the heads read.
        rope: whether `rotary_emb` is used by the blocks.
    """

    states: tuple[tuple[str, str], ...]
    nets: tuple[tuple[str, str], ...]
    output: str
    rope: bool


class Official:
    """Adapter of the official code (see `Adapter`)."""

    method = "forward"

    def resembles(self, module: nn.Module) -> bool:
        names = module._modules.keys()
        return {"lm_head", "q_head"} <= names or ("L_level" in names and "lm_head" in names)

    def resembles_class(self, cls: type) -> bool:
        return all(hasattr(cls, name) for name in ("_input_embeddings", "reset_carry"))

    def differences(self, module: nn.Module) -> list[str]:
        if isinstance(module, Inner):
            return ["it is recurx's own model and runs on recurx already; set `.backend`"]
        needed = ("embed_tokens", "lm_head", "q_head", "L_level", "config", "puzzle_emb_len")
        found = [f"it has no `{name}`" for name in needed if not hasattr(module, name)]
        if found:
            return found
        found += signature_difference(module, "forward", ["carry", "batch"])
        found += signature_difference(module, "_input_embeddings", ["input", "puzzle_identifiers"])
        found += signature_difference(module, "empty_carry", ["batch_size"])
        found += _unless_original(module)
        for name in ("H_cycles", "L_cycles"):
            if not isinstance(getattr(module.config, name, None), int):
                found.append(f"`config.{name}` is no int")
        variant = _variant(module)
        if variant is None:
            found.append(f"its start states are {_starts(module)}, of no published variant")
        for attribute in ("L_level", "H_level") if variant == "hrm" else ("L_level",):
            found += _net_differences(attribute, getattr(module, attribute))
        if variant != "hrm" and "H_level" in module._modules:
            found.append("it has an `H_level`, which this variant does not call")
        return found

    def recipe(self, module: Any, backend: str) -> OfficialRecipe:
        cycles = module.config.H_cycles, module.config.L_cycles
        variant = _variant(module)
        if variant == "hier":
            schedule = Schedule.hier(len(_starts(module)) - 1, *cycles)
        else:
            schedules = {"trm": Schedule.trm, "hrm": Schedule.hrm, "single_z": Schedule.single_z}
            schedule = schedules[variant](*cycles)
        states = [(name, "z_L" if name == "z" else name) for name in schedule.states]
        nets = [(name, f"{name}_level") for name in schedule.nets]
        output = "z" if variant == "single_z" else "z_H"
        spec = _specs(module, nets)[0][1]
        rope = hasattr(module, "rotary_emb") and any(b.kind == ATTENTION for b in spec.blocks)
        return OfficialRecipe(
            schedule, cycles, backend,
            states=tuple(states), nets=tuple(nets), output=output, rope=rope,
        )  # fmt: skip

    def problem(self, module: Any, recipe: OfficialRecipe) -> Problem:
        specs = tuple(_specs(module, recipe.nets))
        start = module.L_init if hasattr(module, "L_init") else module.L1_init
        tokens = module.config.seq_len + module.puzzle_emb_len
        return Problem(
            recipe.schedule, specs, 1, tokens, start.shape[0], start.dtype, start.device.type,
            rope=recipe.rope, needs_grad=module.training,
        )  # fmt: skip

    def replacement(self, recipe: OfficialRecipe) -> Callable[..., object]:
        # NOTE: it is named `forward` because a bound method is pickled as (module, its name): the
        # copy that is unpickled then finds the original method of its class.
        def forward(
            self: Any, carry: Any, batch: Mapping[str, Tensor]
        ) -> tuple[Any, Tensor, tuple[Tensor, Tensor]]:
            if (self.config.H_cycles, self.config.L_cycles) != recipe.cycles:
                raise RecurxError(
                    "recurx.patch: config.H_cycles or L_cycles changed since the patch; "
                    "call handle.remove() and recurx.patch(model) again."
                )
            x = self._input_embeddings(batch["inputs"], batch["puzzle_identifiers"])
            carried = {name: getattr(carry, attribute) for name, attribute in recipe.states}
            states = recurse(
                recipe.schedule,
                {name: getattr(self, attribute) for name, attribute in recipe.nets},
                x.to(carried[recipe.output].dtype),  # wider states promote x in the sums
                carried,
                backend=recipe.backend,
                cos_sin=self.rotary_emb() if recipe.rope else None,
                save=recipe.save,
            )
            answer = states[recipe.output]
            new = {attribute: states[name].detach() for name, attribute in recipe.states}
            logits = self.lm_head(answer)[:, self.puzzle_emb_len :]
            q = self.q_head(answer[:, 0]).to(torch.float32)
            return type(carry)(**new), logits, (q[..., 0], q[..., 1])

        forward.recurx_recipe = recipe  # type: ignore[attr-defined]
        return forward

    def describe(self, module: nn.Module, recipe: OfficialRecipe) -> list[str]:
        calls, window = len(recipe.schedule), recipe.schedule.window
        return [
            f"on recurx: {recipe.schedule.name}, all {calls} net calls, gradient window {window}",
            "stays PyTorch: input embedding, lm_head, q_head, and all around this module "
            "(halting, loss, optimiser)",
        ]

    def probe(self, module: nn.Module, recipe: OfficialRecipe) -> str:
        return probe_forward(module, self)


def _unless_original(module: nn.Module) -> list[str]:
    """Refuse an instance whose `forward` somebody else replaced."""
    own = vars(module).get("forward")
    function = getattr(own, "__func__", None)
    if own is None or function is type(module).forward or hasattr(function, "recurx_recipe"):
        return []
    return ["its `forward` was replaced in the instance by other code"]


def _starts(module: nn.Module) -> list[str]:
    return sorted(name for name in module._buffers if re.fullmatch(r"[HL]\d*_init", name))


def _variant(module: nn.Module) -> str | None:
    starts = _starts(module)
    if starts == ["H_init", "L_init"]:
        return "hrm" if "H_level" in module._modules else "trm"
    if starts == ["L_init"]:
        return "single_z"
    n = len(starts) - 1
    if n >= 2 and set(starts) == {"H_init", *(f"L{k}_init" for k in range(1, n + 1))}:
        return "hier"
    return None


def _net_differences(attribute: str, net: Any) -> list[str]:
    """What is odd about a stack of blocks."""
    if not is_block_stack(net):
        return [f"`{attribute}.layers` is no stack of blocks with (self_attn | mlp_t) and mlp"]
    found: list[str] = []
    extra = [name for name, _ in net.named_parameters() if not name.startswith("layers.")]
    extra += [name for name, _ in net.named_buffers()]
    found += [f"`{attribute}.{name}` is not known" for name in extra]
    for number, layer in enumerate(net.layers):
        where = f"{attribute}.layers.{number}"
        names = {name for name, _ in layer.named_parameters()}
        expected = _MLP | (_ATTENTION if hasattr(layer, "self_attn") else _TOKEN_MLP)
        found += [f"`{where}.{name}` is not known" for name in sorted(names - expected)]
        found += [f"`{where}.{name}` is missing" for name in sorted(expected - names)]
        found += signature_difference(layer, "forward", ["cos_sin", "hidden_states"])
        attention = getattr(layer, "self_attn", None)
        if attention is not None:
            found += _attention_differences(where, attention)
    for name, child in net.named_modules():
        if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks:
            path = f"{attribute}.{name}".rstrip(".")
            found.append(f"`{path}` has hooks, which would no longer run")
    if not found:
        try:
            as_net(net, attribute)
        except InvalidArgument as error:
            found.append(str(error))
    return found


def _attention_differences(where: str, attention: Any) -> list[str]:
    found = []
    if getattr(attention, "causal", False):
        found.append(f"`{where}.self_attn` is causal")
    heads, kv_heads = attention.num_heads, attention.num_key_value_heads
    if heads != kv_heads:
        found.append(f"`{where}.self_attn` has {kv_heads} K/V heads for {heads} heads")
    hidden = attention.o_proj.weight.shape[0]
    if getattr(attention, "head_dim", hidden // heads) * heads != hidden:
        found.append(f"`{where}.self_attn`: head_dim x num_heads is not the width {hidden}")
    return found


def _specs(module: nn.Module, nets: Any) -> list[tuple[str, NetSpec]]:
    bound = [(name, as_net(getattr(module, attribute), attribute)) for name, attribute in nets]
    return [(name, net.spec) for name, net in bound if isinstance(net, Net)]
