"""Official TRM, single-z, hier6 and HRM code: `inner.forward` with its recursion on recurx.

Input embeddings, heads and everything around `inner` stay the model's own code.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from recurx.code import Before, changed
from recurx.models.inner import Inner
from recurx.nets import Net, NetSpec, is_block_stack
from recurx.operands import CosSin
from recurx.patching.adapter import Recipe, signature_difference
from recurx.patching.handle import fall_back, replaced_below
from recurx.patching.probe import empty_carry, probe_forward
from recurx.patching.sharded import nets_of, run_recursion
from recurx.problem import Problem
from recurx.proof import as_net, examine, without_compile
from recurx.readings import attends
from recurx.schedule import INPUT, Schedule, Step


@dataclass(frozen=True, kw_only=True)
class OfficialRecipe(Recipe):
    """How one `inner` maps onto a schedule.

    Args:
        states: (state, attribute of the carry), in the order of the schedule.
        nets: (net, attribute of the module).
        variant: "trm", "hrm", "single_z" or "hier".
        output: the state that the heads read.
        rope: whether `rotary_emb` is used by the blocks.
        around: what the code of a module between the method and the blocks read.
    """

    states: tuple[tuple[str, str], ...]
    nets: tuple[tuple[str, str], ...]
    variant: str
    output: str
    rope: bool
    around: Before | None = None


class Official:
    """Adapter of the official code (see `Adapter`), and of code that differs from it in names."""

    method = "forward"
    follows = ("H_cycles", "L_cycles")
    inputs, labels, rotary = "inputs", "labels", "rotary_emb"
    needed: tuple[str, ...] = (
        "embed_tokens", "lm_head", "q_head", "L_level", "config", "puzzle_emb_len",
    )  # fmt: skip
    takes: tuple[str, ...] = ("carry", "batch")
    carry_takes: tuple[str, ...] = ("batch_size",)
    embed_takes: tuple[str, ...] = ("input", "puzzle_identifiers")
    single = "z_L"  # attribute of the carry for the state of systems with one
    draws = False  # whether its own code draws random numbers that the replacement does not
    one_q = False  # whether the q head has one output, and no second one to learn when to go on

    def settings(self, module: Any) -> Any:
        """Whose attributes are the sizes, H_cycles and L_cycles."""
        return module.config

    def resembles(self, module: nn.Module) -> bool:
        names = module._modules.keys()
        heads = "q_head" in names and "lenet" not in names  # that is nano-trm's
        return "lm_head" in names and ("L_level" in names or heads)

    def variant(self, module: nn.Module) -> str | None:
        """Which published recursion it is, by its start states; None if none."""
        return _variant(module)

    def starts(self, module: nn.Module) -> list[str]:
        """The buffers that are the start states."""
        return _starts(module)

    def prefix(self, module: Any) -> int:
        """Tokens before those of the puzzle."""
        return int(getattr(module, "puzzle_emb_len", 0))

    def embed(self, module: Any, batch: Mapping[str, Tensor]) -> Tensor:
        given = (self.inputs, "puzzle_identifiers")[: len(self.embed_takes)]
        return module._input_embeddings(*(batch[name] for name in given))  # type: ignore[no-any-return]

    def schedule(self, module: Any, variant: str, states: int) -> Schedule:
        """The net calls that the settings say at present."""
        cycles = self.settings(module).H_cycles, self.settings(module).L_cycles
        return schedule_of(variant, states, *cycles)

    def modules(self, module: Any, recipe: OfficialRecipe) -> dict[str, Any]:
        """{net of the schedule: the module}."""
        return {name: attrgetter(path)(module) for name, path in recipe.nets}

    def renewed(self, carry: Any, new: dict[str, Tensor]) -> Any:
        return type(carry)(**new)

    def why_not(self, module: Any, recipe: OfficialRecipe, carry: Any, nets: Any) -> str | None:
        """What else keeps a call from the proved nets."""
        return None

    def results(self, output: Any) -> dict[str, Tensor]:
        """What a probe compares."""
        new, logits, q = output
        named = zip(("q_halt", "q_continue"), q if isinstance(q, tuple) else (q,), strict=False)
        states = {f"carry.{n}": z for n, z in vars(new).items() if isinstance(z, Tensor)}
        return {"logits": logits, **dict(named), **states}

    def nets(self, module: Any) -> dict[str, str]:
        """{net of the schedule: attribute}."""
        return {"L": "L_level", **({"H": "H_level"} if self.variant(module) == "hrm" else {})}

    def resembles_class(self, cls: type) -> bool:
        return all(hasattr(cls, name) for name in ("_input_embeddings", "reset_carry"))

    def differences(self, module: nn.Module) -> list[str]:
        if isinstance(module, Inner):
            return ["it is recurx's own model and runs on recurx already; set `.backend`"]
        found = [f"it has no `{name}`" for name in self.needed if not hasattr(module, name)]
        if found:
            return found
        found += signature_difference(module, self.method, list(self.takes))
        found += signature_difference(module, "_input_embeddings", list(self.embed_takes))
        if self.carry_takes:
            found += signature_difference(module, "empty_carry", list(self.carry_takes))
        found += _unless_original(module, self.method)
        for name in ("H_cycles", "L_cycles"):
            if not isinstance(getattr(self.settings(module), name, None), int):
                found.append(f"its setting `{name}` is no int")
        variant = self.variant(module)
        if variant is None:
            found.append(f"its start states are {_starts(module)}, of no published variant")
        for attribute in self.nets(module).values():
            rope = hasattr(module, self.rotary)
            found += net_differences(attribute, attrgetter(attribute)(module), rope)
        if variant != "hrm" and "H_level" in module._modules:
            found.append("it has an `H_level`, which this variant does not call")
        return found

    def recipe(self, module: Any, backend: str) -> OfficialRecipe:
        cycles = self.settings(module).H_cycles, self.settings(module).L_cycles
        variant, count = str(self.variant(module)), len(self.starts(module))
        schedule = self.schedule(module, variant, count)
        states = [(name, self.single if name == "z" else name) for name in schedule.states]
        nets = [(name, self.nets(module)[name]) for name in schedule.nets]
        output = "z" if "z" in schedule.states else "z_H"
        rope = hasattr(module, self.rotary)
        rope = rope and any(attends(spec) for _, spec in specs_of(module, nets, rope))
        return OfficialRecipe(
            schedule, cycles, backend, variant=variant,
            states=tuple(states), nets=tuple(nets), output=output, rope=rope,
        )  # fmt: skip

    def problem(self, module: Any, recipe: OfficialRecipe) -> Problem:
        specs = tuple(specs_of(module, recipe.nets, recipe.rope))
        start = getattr(module, self.starts(module)[-1])
        tokens = self.settings(module).seq_len + self.prefix(module)
        dtype = start.dtype
        if self.carry_takes:
            # `.half()` casts the starts; the carry that they are put into keeps the forward's dtype
            carry = next(iter(vars(empty_carry(module, 0, start.device)).values()))
            dtype = torch.promote_types(dtype, carry.dtype)
        return Problem(
            recipe.schedule, specs, 1, tokens, start.shape[0], dtype, start.device.type,
            rope=recipe.rope, needs_grad=module.training,
        )  # fmt: skip

    def replacement(self, recipe: OfficialRecipe) -> Callable[..., object]:
        adapter, method, rotary, one_q = self, self.method, self.rotary, self.one_q

        def forward(self: Any, carry: Any, batch: Mapping[str, Tensor]) -> Any:
            tables = getattr(self, rotary)() if recipe.rope and hasattr(self, rotary) else None
            nets = adapter.bound(self, recipe, tables)
            if not isinstance(nets, str):
                nets = adapter.why_not(self, recipe, carry, nets) or nets
            if isinstance(nets, str):
                return fall_back(self, recipe, method, nets)(carry, batch)
            # anew: a curriculum of depth changes the cycles
            schedule = adapter.schedule(self, recipe.variant, len(recipe.states))
            x = adapter.embed(self, batch)
            carried = {name: getattr(carry, attribute) for name, attribute in recipe.states}
            states = run_recursion(recipe, schedule, nets, x, carried, tables)
            if isinstance(states, str):
                return fall_back(self, recipe, method, states)(carry, batch)
            answer = states[recipe.output]
            new = {attribute: states[name].detach() for name, attribute in recipe.states}
            logits = self.lm_head(answer)[:, adapter.prefix(self) :]
            q = self.q_head(answer[:, 0]).to(torch.float32)
            new_carry = adapter.renewed(carry, new)
            return new_carry, logits, q[..., 0] if one_q else (q[..., 0], q[..., 1])

        forward.__name__ = method
        forward.recurx_recipe = recipe  # type: ignore[attr-defined]
        return forward

    def bound(self, module: Any, recipe: OfficialRecipe, tables: CosSin | None) -> Any:
        """What runs each net, or why the model's own code has to."""
        nets = nets_of(recipe, self.modules(module, recipe), tables)
        if not isinstance(nets, str) and replaced_below(module, self.method):
            return f"the `{self.method}` of its class was replaced"
        return nets if isinstance(nets, str) else changed(module, self.method, recipe.code) or nets

    def describe(self, module: nn.Module, recipe: OfficialRecipe) -> list[str]:
        calls, window = len(recipe.schedule), recipe.schedule.window
        return [
            f"on recurx: {recipe.schedule.name}, all {calls} net calls, gradient window {window}",
            f"stays PyTorch: input embedding, lm_head, q_head, and all around its `{self.method}` "
            "(halting, loss, optimiser)",
        ]

    def probe(self, module: nn.Module, recipe: OfficialRecipe) -> str:
        return probe_forward(module, self)


def _unless_original(module: nn.Module, method: str) -> list[str]:
    """Refuse an instance whose method somebody else replaced."""
    own = vars(module).get(method)
    if own is None or getattr(own, "__func__", None) is getattr(type(module), method):
        return []
    return [
        f"its `{method}` was replaced in the instance by other code (torch.compile, say): patch "
        f"first, then let that code wrap the patched method"
    ]


def _starts(module: nn.Module) -> list[str]:
    return sorted(name for name in module._buffers if re.fullmatch(r"(z_)?[HL]\d*_init", name))


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


def net_differences(attribute: str, net: Any, rope: bool) -> list[str]:
    """What keeps a stack of blocks from being run by its weights."""
    net = without_compile(net)
    if not is_block_stack(net):
        return [f"`{attribute}.layers` is no stack of blocks with (self_attn | mlp_t) and mlp"]
    difference = examine(net, attribute, rope).difference
    return [] if difference is None else [difference]


def specs_of(module: nn.Module, nets: Any, rope: bool) -> list[tuple[str, NetSpec]]:
    bound = [(name, as_net(attrgetter(at)(module), at, rope)) for name, at in nets]
    return [(name, net.spec) for name, net in bound if isinstance(net, Net)]


@functools.lru_cache(maxsize=256)
def _schedule(
    variant: str, states: int, h_cycles: int, l_cycles: int, window: int | None, **factors: float
) -> Schedule:
    if variant == "hier":
        return Schedule.hier(states - 1, h_cycles, l_cycles)
    if variant == "urm":
        steps = (Step("L", "z", ("z",), (INPUT,)),) * (h_cycles * l_cycles)
        name = f"urm({h_cycles}, {l_cycles})"
        return Schedule(steps, grad_from=len(steps) - l_cycles, name=name)
    if variant == "sic":  # gradient flows into what enters the cycle
        found = Schedule.trm(1, l_cycles)
        found = Schedule(found.steps, detach_carry=False, name=f"sic({l_cycles})")
    else:
        schedules = {"trm": Schedule.trm, "hrm": Schedule.hrm, "single_z": Schedule.single_z}
        found = schedules[variant](h_cycles, l_cycles, window)
    return found.with_factors(**factors) if factors else found


def schedule_of(
    variant: str,
    states: int,
    h_cycles: int,
    l_cycles: int,
    window: int | None = None,
    **factors: float,
) -> Schedule:
    """The schedule of a variant with so many states, for torch.compile a constant."""
    return _schedule(variant, states, h_cycles, l_cycles, window, **factors)


schedule_of._dynamo_marked_constant = True  # type: ignore[attr-defined]
