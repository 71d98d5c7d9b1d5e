"""FPRM: a stack iterated to a fixed point, whose step size follows from each sample's residual.

One call of its `_z_step` is

    h = a2 y + b2 x                  (before it, a convolution over the tokens where there is one)
    for each sublayer f:  h = a1 h + b1 f(norm h)
    y = s h + (1 - s) y              s: the sample's step size, which shrinks as residuals do not

The solver (step sizes, residuals, noise) and what stands before the first layer stay its own code,
which also makes a1 and b1 from their parameters; the layers run on recurx. a1 and b1 are 1
(`residual_scale` "none", or `outer_only`), one number ("fixed") or one a channel
("input-independent", as published). Made from the states ("input-dependent") they are refused.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from recurx.api import recurse
from recurx.code import Before, Code, changed
from recurx.errors import UnsupportedModel
from recurx.experiments.systems.foreign import Layout, Slot, Unspelled, layout_of, net_of
from recurx.nets import Net
from recurx.operands import CosSin
from recurx.patching.adapter import Recipe, signature_difference
from recurx.patching.handle import fall_back, original, replaced_below
from recurx.patching.probe import undisturbed
from recurx.problem import Problem
from recurx.readings import attends
from recurx.schedule import Schedule, Step
from recurx.specs import ATTENTION, NORM, TOKEN_MLP, BlockSpec, NetSpec
from recurx.survey import HOOKS

_CALL = Schedule((Step("L", "z", ("z",)),), detach_carry=False, name="fprm")
_PLACES = {"post-norm": "post", "pre-norm": "pre", "peri-norm": "sandwich"}
_PROBED = {"skip": 0.7, "scale": 1.3}  # a1 and b1 while the layers are proved
_TOLERANCE = 1e-3  # of the probe, as for fp32 in recurx/patching/probe.py


@dataclasses.dataclass(frozen=True, kw_only=True)
class FPRMRecipe(Recipe):
    """`around`: what the code of `L_level` read, which stands between the method and the layers."""

    around: Before | None = None


class FPRM:
    """Adapter of FPRM's code (see `Adapter`). Source: arXiv 2606.18206."""

    method = "_z_step"
    follows: tuple[str, ...] = ()

    def resembles(self, module: nn.Module) -> bool:
        return {"L_level", "L_optimizer", "lm_head"} <= module._modules.keys()

    def resembles_class(self, cls: type) -> bool:
        return all(hasattr(cls, name) for name in ("_z_step", "_jacobian_reg", "reset_carry"))

    def differences(self, module: Any) -> list[str]:
        arguments = ["state", "input_embeddings", "dropout_mask", "seq_info"]
        found = signature_difference(module, self.method, arguments)
        level = module.L_level
        if (learned := _learned(level)) is None:
            found.append(
                f"the factors of its residuals follow from the states (`residual_scale` "
                f"{level.residual_scale!r}): those of BlockSpec are constant or learned"
            )
        elif learned == "channel" and any("mlp_t" in layer._modules for layer in level.layers):
            found.append(
                "its token MLP has a factor a channel: a BlockSpec that is normed over T has one "
                "(`learned_skip`)"
            )
        if level.norm_placement not in ("none", "input", "output"):
            found.append(f"its `norm_placement` is {level.norm_placement!r}")
        if not found and isinstance(net := _net_of(module, hasattr(module, "rotary_emb")), str):
            found.append(net)
        return found + [why for why in [_hooked(level)] if why]

    def recipe(self, module: Any, backend: str) -> FPRMRecipe:
        around = Code(module.L_level, "forward", ()).before
        return FPRMRecipe(_CALL, (1, 1), backend, around=around)

    def problem(self, module: Any, recipe: Recipe) -> Problem:
        rope = hasattr(module, "rotary_emb")
        net = _net_of(module, rope)
        if isinstance(net, str):
            raise UnsupportedModel(net)
        config, weight = module.config, module.lm_head.weight
        return Problem(
            _CALL, (("L", net.spec),), 1, config.seq_len + module.puzzle_emb_len,
            config.hidden_size, module.forward_dtype, weight.device.type,
            rope=rope and attends(net.spec), needs_grad=module.training,
        )  # fmt: skip

    def replacement(self, recipe: FPRMRecipe) -> Callable[..., object]:
        # Named as the method that it replaces; see `patching.official`.
        def _z_step(
            self: Any,
            state: dict[str, Tensor],
            input_embeddings: Tensor,
            dropout_mask: Tensor,
            seq_info: Mapping[str, Any],
        ) -> Any:
            tables, level = seq_info["cos_sin"], self.L_level
            net = _net_of(self, tables is not None)
            why = net if isinstance(net, str) else _hooked(level)
            if replaced_below(self, "_z_step"):
                why = "the `_z_step` of its class was replaced"
            why = why or changed(self, "_z_step", recipe.code)
            why = why or changed(level, "forward", recipe.around)
            if why:
                method = fall_back(self, recipe, "_z_step", why)
                return method(state, input_embeddings, dropout_mask, seq_info)
            h, factors = _entering(level, state["y"], input_embeddings, seq_info)
            net = _with_factors(level, net, factors)
            tables = tables if attends(net.spec) else None
            new = recurse(
                _CALL, {"L": net}, h, {"z": h}, backend=recipe.backend, save=recipe.save,
                cos_sin=tables,
            )  # fmt: skip
            return self.L_optimizer.step(state, dropout_mask * new["z"])

        _z_step.recurx_recipe = recipe  # type: ignore[attr-defined]
        return _z_step

    def describe(self, module: Any, recipe: Recipe) -> list[str]:
        count = len(module.L_level.layers)
        return [
            f"on recurx: the {count} layers of `L_level`, at every iteration",
            "stays PyTorch: what stands before them (convolution, mix of state and input, factors "
            "of residuals), the solver with its step sizes, embedding, heads, halting, regulariser "
            "and loss",
        ]

    def probe(self, module: Any, recipe: FPRMRecipe) -> str:
        """One iteration of each, in training and evaluation, with gradients."""
        weight = module.lm_head.weight
        if weight.is_meta:
            return "not probed: the weights are on the meta device"
        eager = dataclasses.replace(recipe, backend="eager")
        given = MethodType(self.replacement(eager), module)
        before = MethodType(original(type(module), self.method), module)
        worst = 0.0
        with torch.inference_mode(False), torch.enable_grad():
            for training in (False, True):
                found = []
                for run in (before, given):
                    with undisturbed(module, training):
                        found.append(_tried(module, run, weight.device))
                for name, want in found[0].items():
                    error = float((found[1][name] - want).norm() / want.norm().clamp_min(1e-30))
                    worst = max(worst, error)
                    if not error <= _TOLERANCE:
                        raise UnsupportedModel(
                            f"it computes something else: {name} differs from the original's by "
                            f"{error:.2g} of its norm (allowed {_TOLERANCE})"
                        )
        return f"probed against the original (one iteration): all within {worst:.1e}"


def _tried(module: Any, step: Callable[..., Any], device: torch.device) -> dict[str, Tensor]:
    try:
        return _iterated(module, step, device)
    except RuntimeError as error:  # parts of it may run under autocast alone
        raise UnsupportedModel(f"an iteration in fp32 fails: {error}") from error


def _iterated(module: Any, step: Callable[..., Any], device: torch.device) -> dict[str, Tensor]:
    """The new state of an iteration on random ones in fp32, and gradients of a loss over it."""
    config, generator = module.config, torch.Generator().manual_seed(0)
    shape = 2, config.seq_len + module.puzzle_emb_len, config.hidden_size
    how: Any = {"generator": generator, "device": "cpu"}
    y, x, mask = (torch.randn(shape, **how).to(device) for _ in range(3))
    flags = torch.ones(2, dtype=torch.bool, device=device)
    state = module.L_optimizer.reset(flags, shape, torch.float32, device, None)
    inputs = [y.requires_grad_(), x.requires_grad_()]
    state["y"], state["stepsize"] = y * 1.0, torch.full_like(state["stepsize"], 0.7)
    tables = module.rotary_emb() if hasattr(module, "rotary_emb") else None
    info = {"cos_sin": tables, "puzzle_emb_len": module.puzzle_emb_len}
    new = step(state, x, mask, info)
    named = [(n, p) for n, p in module.L_level.named_parameters() if p.requires_grad]
    loss = new["y"].square().mean() + new["y"].mean()
    leaves = [*inputs, *(p for _, p in named)]
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    names = ["the state", "the input", *(f"`L_level.{name}`" for name, _ in named)]
    found = {f"gradient of {n}": g for n, g in zip(names, grads, strict=True)}
    return found | {n: v.detach().float() for n, v in new.items() if isinstance(v, Tensor)}


class _Entry(nn.Module):
    """Stands in for a layer: keeps the factors that it is called with, and leaves h as it is."""

    factors: tuple[Tensor, Tensor]

    def forward(self, hidden_states: Tensor, alpha_1: Tensor, beta_1: Tensor, **_: Any) -> Tensor:
        self.factors = alpha_1, beta_1
        return hidden_states


def _entering(
    level: Any, y: Tensor, x: Tensor, info: Mapping[str, Any]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What reaches the first layer, a1 and b1: its own forward over as many layers that do nothing,
    and without the last norm."""
    bare: Any = object.__new__(type(level))
    entry = _Entry()
    place = "none" if level.norm_placement == "output" else level.norm_placement
    children = {**level._modules, "layers": nn.ModuleList([entry] * len(level.layers))}
    vars(bare).update(vars(level), _modules=children, norm_placement=place)
    entering: Tensor = bare(y, x, **info)
    return entering, entry.factors


def _learned(level: Any) -> str | None:
    """How a1 and b1 are spelled: "" where they are 1; None where they follow from the states."""
    if level.residual_scale is None or level.outer_only:
        return ""
    alpha = level._parameters.get("alpha_1_param")
    return None if alpha is None else "channel" if alpha.ndim else "scalar"


_steady: weakref.WeakKeyDictionary[nn.Module, tuple[Tensor, ...]] = weakref.WeakKeyDictionary()


def _with_factors(level: Any, net: Net, factors: tuple[Tensor, ...]) -> Net:
    """The net with a1 and b1 in the place of those of the probe.

    Where no gradient is wanted they lie where those of the call before lay, since engines find
    what they packed by the addresses of all weights.
    """
    if not _learned(level):
        return net
    flat = tuple(factor.reshape(-1) for factor in factors)
    captured = flat[0].is_cuda and torch.cuda.is_current_stream_capturing()
    if not torch.is_grad_enabled() and not captured:
        like = [(t.shape, t.dtype, t.device) for t in flat]
        kept = _steady.get(level)
        if kept is None or [(t.shape, t.dtype, t.device) for t in kept] != like:
            with torch.inference_mode(False), torch.no_grad():
                _steady[level] = kept = tuple(factor.clone() for factor in flat)
        for own, factor in zip(kept, flat, strict=True):
            own.copy_(factor)
        flat = kept
    named = dict(zip(_PROBED, flat, strict=True))
    slots = [name for block in net.spec.blocks for name, _ in block.slots]
    return Net(net.spec, [named.get(n[:-1], w) for n, w in zip(slots, net.weights, strict=True)])


def _hooked(level: Any) -> str | None:
    own = vars(level)
    hooked = any(own[name] for name in HOOKS) or "forward" in own
    return (
        "`L_level` has hooks, or a `forward` in the instance, around its layers" if hooked else None
    )


def _net_of(module: Any, rope: bool) -> Any:
    """The layers as a net, with the norm after them where there is one; or what differs.

    The layers are proved with factors, whatever the level has; then those that it has are spelled.
    """
    level, learned = module.L_level, _learned(module.L_level) or ""
    found = net_of(level.layers, "L_level.layers", _layers, _called, rope)
    if not isinstance(found, Net):
        return found or "`L_level.layers` are no layers with (self_attn | mlp_t) and mlp"
    last = float(level.config.rms_norm_eps) if level.norm_placement == "output" else None
    slots = [name for block in found.spec.blocks for name, _ in block.slots]
    named = zip(slots, found.weights, strict=True)
    weights = [weight for name, weight in named if learned or name[:-1] not in _PROBED]
    return Net.trusted(_spelled(found.spec, learned, last), weights)


@functools.lru_cache(maxsize=64)  # asked at every iteration
def _spelled(proved: NetSpec, learned: str, last: float | None) -> NetSpec:
    """The blocks with the factors that a level has, and after them the norm of eps `last`."""
    kinds = dict.fromkeys(("learned_skip", "learned_scale"), learned)
    blocks = [dataclasses.replace(block, **kinds) for block in proved.blocks]
    if last is not None:
        blocks.append(BlockSpec(NORM, proved.hidden, 0, eps=last))
    return NetSpec(tuple(blocks))


def _called(layers: Any, h: Tensor, cos_sin: CosSin | None) -> Tensor:
    alpha, beta = (h.new_full((1, 1, 1), value) for value in _PROBED.values())
    for layer in layers:
        h = layer(cos_sin=cos_sin, hidden_states=h, alpha_1=alpha, beta_1=beta)
    return h


def _layers(layers: Any) -> Layout:
    """Blocks of `L_level.layers`; linear layers multiply their weights by a mask in training."""
    found = []
    for number, layer in enumerate(layers):
        attends = "self_attn" in layer._modules
        mixer = layer.self_attn if attends else layer.mlp_t
        paths = {"gate_up": "mlp.gate_up_proj", "down": "mlp.down_proj"}
        more: dict[str, Any] = {}
        if attends:
            paths |= {"qkv": "self_attn.qkv_proj", "o": "self_attn.o_proj"}
            more = {"num_heads": mixer.num_heads, "mask": "causal" * mixer.causal}
            if mixer.softmax_temp != 1:
                raise Unspelled(
                    f"its attention has a temperature of {mixer.softmax_temp} (`softmax_temp`), "
                    "for which BlockSpec has no field"
                )
        else:
            paths |= {"t_gate_up": "mlp_t.gate_up_proj", "t_down": "mlp_t.down_proj"}
            more = dict(zip(("tokens", "token_inner"), mixer.down_proj.weight.shape, strict=True))
        slots = {f"{n}{i}": Slot((), plus=v) for n, v in _PROBED.items() for i in "12"}
        for slot, path in paths.items():
            if "mask" not in layer.get_submodule(path)._buffers:
                raise Unspelled(f"`{number}.{path}` is no linear layer with a mask")
            masks = (f"{number}.{path}.mask",)
            slots[slot] = Slot((f"{number}.{path}.weight",), masks=masks)
        kind, (hidden, inner) = (
            ATTENTION if attends else TOKEN_MLP,
            layer.mlp.down_proj.weight.shape,
        )
        more |= dict(placement=_PLACES[layer.norm_type], learned_skip="scalar")
        eps = float(layer.norm_eps)
        spec = BlockSpec(kind, hidden, inner, eps=eps, learned_scale="scalar", **more)
        found.append((spec, slots))
    return layout_of(found)
