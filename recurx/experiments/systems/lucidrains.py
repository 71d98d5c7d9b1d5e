"""lucidrains' `TinyRecursiveModel`: its refinement loop, whatever network it calls.

The network is any `nn.Module` [B, N, D] -> [B, N, D]. A `recurx.models.ReasoningNet` runs fused,
and so do the networks of `usual_nets.py` once they are proved; others stay PyTorch. One block of
refinement is
n x `latents <- net((outputs + latents) + inputs)`, then `outputs <- net(outputs + latents)`; the
last block has gradient. Note the order of the sum: it is not that of the official code.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from recurx.api import recurse
from recurx.code import changed
from recurx.errors import UnsupportedModel
from recurx.experiments.systems.foreign import net_of
from recurx.experiments.systems.usual_nets import usual_net
from recurx.models.layers import ReasoningNet
from recurx.nets import Net
from recurx.patching.adapter import Recipe, signature_difference
from recurx.patching.handle import fall_back, original, replaced_below
from recurx.patching.probe import undisturbed
from recurx.probing import random_state
from recurx.problem import Problem
from recurx.proof import as_net, proved
from recurx.schedule import INPUT, Schedule, Step

_NAMES = ("network", "num_latent_refinements", "num_refinement_blocks")


class Lucidrains:
    """Adapter of lucidrains' package (see `Adapter`): states "outputs" and "latents", net "net"."""

    method = "deep_refinement"
    follows = ("num_refinement_blocks", "num_latent_refinements")

    def resembles(self, module: nn.Module) -> bool:
        return hasattr(module, "deep_refinement")

    def resembles_class(self, cls: type) -> bool:
        return hasattr(cls, "deep_refinement")

    def differences(self, module: nn.Module) -> list[str]:
        found = [f"it has no `{name}`" for name in _NAMES if not hasattr(module, name)]
        arguments = ["inputs", "outputs", "latents"]
        found += signature_difference(module, "deep_refinement", arguments)
        found += signature_difference(module, "refine_latent_then_output_once", arguments)
        if not found and module.num_refinement_blocks < 2:
            found.append("with one refinement block, gradient would flow into the entering states")
        return found

    def recipe(self, module: Any, backend: str) -> Recipe:
        blocks, latents = module.num_refinement_blocks, module.num_latent_refinements
        return Recipe(schedule_of(blocks, latents), (blocks, latents), backend)

    def problem(self, module: Any, recipe: Recipe) -> Problem:
        net, weight = as_net(_net_of(module)), module.output_init_embed
        specs = [net.spec] if isinstance(net, Net) else []
        tokens = max([1, *(block.tokens for spec in specs for block in spec.blocks)])
        return Problem(
            recipe.schedule, tuple(("net", spec) for spec in specs),
            1, tokens, weight.shape[-1], weight.dtype, weight.device.type,
            needs_grad=module.training, opaque=() if specs else ("net",),
        )  # fmt: skip

    def replacement(self, recipe: Recipe) -> Callable[..., object]:
        # Named as the method that it replaces; see `patching.official`.
        def deep_refinement(
            self: Any, inputs: Tensor, outputs: Tensor, latents: Tensor
        ) -> tuple[Tensor, Tensor]:
            net, method = proved(_net_of(self, inputs.dtype), "network"), "deep_refinement"
            if replaced_below(self, method):
                net = f"the `{method}` of its class was replaced"
            elif self.num_refinement_blocks < 2:
                net = "it has one refinement block, which gives gradient to the entering states"
            net = changed(self, method, recipe.code) or net
            if isinstance(net, str):
                return fall_back(self, recipe, method, net)(inputs, outputs, latents)
            schedule = schedule_of(self.num_refinement_blocks, self.num_latent_refinements)
            carry = {
                # [D] at the start, [B, N, D] later; sums with `inputs` promote dtypes anyway
                "outputs": outputs.expand_as(inputs).to(inputs.dtype),
                "latents": latents.expand_as(inputs).to(inputs.dtype),
            }
            states = recurse(
                schedule, {"net": net}, inputs, carry,
                backend=recipe.backend, save=recipe.save,
            )  # fmt: skip
            return states["outputs"], states["latents"]

        deep_refinement.recurx_recipe = recipe  # type: ignore[attr-defined]
        return deep_refinement

    def describe(self, module: Any, recipe: Recipe) -> list[str]:
        kind = type(module.network).__name__
        calls, window = len(recipe.schedule), recipe.schedule.window
        loop = f"on recurx: the loop of {calls} calls, gradient window {window}"
        rest = "embedding, registers, prediction heads, halting and loss"
        found = _spelled(module.network, module.output_init_embed.dtype)
        if isinstance(module.network, ReasoningNet) or isinstance(found, Net):
            return [f"{loop}, and the network ({kind})", f"stays PyTorch: {rest}"]
        why = f": {found}" if found else ""
        return [loop, f"stays PyTorch: the network ({kind}, foreign code{why}), {rest}"]

    def probe(self, module: Any, recipe: Recipe) -> str:
        """Compare the loops over a stand-in for the network, whose input shape is not known."""
        if module.output_init_embed.is_meta:
            return "not probed: the weights are on the meta device"
        function = self.replacement(dataclasses.replace(recipe, backend="eager"))
        width, device = module.output_init_embed.shape[-1], module.output_init_embed.device
        generator = torch.Generator().manual_seed(0)
        how: Any = {"generator": generator, "device": "cpu"}  # said, as in `probe.random_tokens`
        inputs = torch.randn(2, 3, width, **how).to(device).requires_grad_()
        starts = [torch.randn(width, **how).to(device) for _ in range(2)]
        network = module._modules["network"]
        module._modules["network"] = _StandIn()
        try:
            with torch.inference_mode(False), torch.enable_grad():
                before = MethodType(original(type(module), self.method), module)
                for training in (False, True):
                    with undisturbed(module, training):
                        want, drawn = _loop(before, inputs, *starts), random_state(device)
                    with undisturbed(module, training):
                        got = _loop(MethodType(function, module), inputs, *starts)
                        _compare(got, want, drawn == random_state(device))
        finally:
            module._modules["network"] = network
        return "probed: the loop over a stand-in network is bit-identical, gradient included"


class _StandIn(nn.Module):
    """Any smooth function; not linear, so that order and number of the calls matter."""

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(0.7 * h + 0.1)


@functools.lru_cache(maxsize=256)
def _schedule(blocks: int, latents: int) -> Schedule:
    cycle = [Step("net", "latents", ("outputs", "latents", INPUT))] * latents
    cycle += [Step("net", "outputs", ("outputs", "latents"))]
    steps = tuple(cycle) * blocks
    name = f"lucidrains({blocks}, {latents})"
    return Schedule(steps, grad_from=len(steps) - len(cycle), name=name)


def schedule_of(blocks: int, latents: int) -> Schedule:
    """The schedule of so many refinements, for torch.compile a constant."""
    return _schedule(blocks, latents)


schedule_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _compare(got: tuple[Tensor, ...], want: tuple[Tensor, ...], drawn_alike: bool) -> None:
    for name, ours, theirs in zip(("outputs", "latents", "gradient"), got, want, strict=True):
        if not torch.equal(ours, theirs):
            raise UnsupportedModel(
                f"its loop computes something else: {name} differ by "
                f"{(ours - theirs).abs().max():.2g} with a stand-in network"
            )
    if not drawn_alike:
        raise UnsupportedModel("its loop draws random numbers (dropout, noise)")


def _loop(
    deep_refinement: Callable[..., tuple[Tensor, Tensor]],
    inputs: Tensor,
    outputs: Tensor,
    latents: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs, latents = deep_refinement(inputs, outputs, latents)
    (gradient,) = torch.autograd.grad(outputs.square().sum() + latents.sum(), inputs)
    return outputs.detach(), latents.detach(), gradient


def _net_of(module: Any, dtype: torch.dtype | None = None) -> Any:
    """The network as recurx shall see it: code that is not proved is called, never read."""
    network = module.network
    if isinstance(network, ReasoningNet):
        return network
    found = _spelled(network, module.output_init_embed.dtype if dtype is None else dtype)
    return found if isinstance(found, Net) else lambda h: network(h)


def _spelled(network: Any, dtype: torch.dtype) -> Net | str | None:
    """The network as a net, why it is none, or None of one that nobody reads."""
    if torch.compiler.is_compiling():
        return "torch.compile traces its own code"
    found = net_of(network, "network", usual_net, lambda own, h, _: own(h))
    if not isinstance(found, Net):
        return found
    device = found.weights[0].device.type
    if torch.is_autocast_enabled(device):
        return f"autocast rounds inside it ({device})"
    if any(weight.dtype is not dtype for weight in found.weights):
        return f"its weights are not of the states' {str(dtype)[6:]}, which its own code refuses"
    return found
