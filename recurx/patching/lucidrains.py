"""lucidrains' `TinyRecursiveModel`: its refinement loop, whatever network it calls.

The network is any `nn.Module` [B, N, D] -> [B, N, D], so it stays PyTorch, unless it is a
`recurx.models.ReasoningNet`, which runs fused. One block of refinement is
n x `latents <- net((outputs + latents) + inputs)`, then `outputs <- net(outputs + latents)`; the
last block has gradient. Note the order of the sum: it is not that of the official code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from recurx.api import recurse
from recurx.errors import UnsupportedModel
from recurx.models.layers import ReasoningNet
from recurx.nets import Net, as_net
from recurx.patching.adapter import Recipe, signature_difference
from recurx.problem import Problem
from recurx.schedule import INPUT, Schedule, Step

_NAMES = ("network", "num_latent_refinements", "num_refinement_blocks")


class Lucidrains:
    """Adapter of lucidrains' package (see `Adapter`): states "outputs" and "latents", net "net"."""

    method = "deep_refinement"

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
        cycle = [Step("net", "latents", ("outputs", "latents", INPUT))] * latents
        cycle += [Step("net", "outputs", ("outputs", "latents"))]
        steps = tuple(cycle) * blocks
        name = f"lucidrains({blocks}, {latents})"
        schedule = Schedule(steps, grad_from=len(steps) - len(cycle), name=name)
        return Recipe(schedule, (blocks, latents), backend)

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
            if (self.num_refinement_blocks, self.num_latent_refinements) != recipe.cycles:
                raise UnsupportedModel(
                    "recurx.patch: the number of refinements changed since the patch; "
                    "call handle.remove() and recurx.patch(model) again."
                )
            carry = {
                # [D] at the start, [B, N, D] later; sums with `inputs` promote dtypes anyway
                "outputs": outputs.expand_as(inputs).to(inputs.dtype),
                "latents": latents.expand_as(inputs).to(inputs.dtype),
            }
            states = recurse(
                recipe.schedule, {"net": _net_of(self)}, inputs, carry,
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
        if isinstance(module.network, ReasoningNet):
            return [f"{loop}, and the network ({kind})", f"stays PyTorch: {rest}"]
        return [loop, f"stays PyTorch: the network ({kind}, foreign code), {rest}"]

    def probe(self, module: Any, recipe: Recipe) -> str:
        """Compare the loops over a stand-in for the network, whose input shape is not known."""
        if module.output_init_embed.is_meta:
            return "not probed: the weights are on the meta device"
        function = self.replacement(dataclasses.replace(recipe, backend="eager"))
        width, device = module.output_init_embed.shape[-1], module.output_init_embed.device
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(2, 3, width, generator=generator).to(device).requires_grad_()
        starts = [torch.randn(width, generator=generator).to(device) for _ in range(2)]
        network = module._modules["network"]
        module._modules["network"] = _StandIn()
        try:
            with torch.inference_mode(False), torch.enable_grad():
                original = MethodType(type(module).deep_refinement, module)
                want = _loop(original, inputs, *starts)
                got = _loop(MethodType(function, module), inputs, *starts)
        finally:
            module._modules["network"] = network
        for name, ours, theirs in zip(("outputs", "latents", "gradient"), got, want, strict=True):
            if not torch.equal(ours, theirs):
                raise UnsupportedModel(
                    f"its loop computes something else: {name} differ by "
                    f"{(ours - theirs).abs().max():.2g} with a stand-in network"
                )
        return "probed: the loop over a stand-in network is bit-identical, gradient included"


class _StandIn(nn.Module):
    """Any smooth function; not linear, so that order and number of the calls matter."""

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(0.7 * h + 0.1)


def _loop(
    deep_refinement: Callable[..., tuple[Tensor, Tensor]],
    inputs: Tensor,
    outputs: Tensor,
    latents: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs, latents = deep_refinement(inputs, outputs, latents)
    (gradient,) = torch.autograd.grad(outputs.square().sum() + latents.sum(), inputs)
    return outputs.detach(), latents.detach(), gradient


def _net_of(module: Any) -> Any:
    """The network as recurx shall see it: foreign code is called, never read as blocks."""
    network = module.network
    return network if isinstance(network, ReasoningNet) else lambda h: network(h)
