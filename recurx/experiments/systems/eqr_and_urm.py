"""EqR and URM: code like the official one, in which the recursion around the blocks differs."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from recurx.code import Code, changed
from recurx.errors import UnsupportedModel
from recurx.nets import Net
from recurx.patching.official import Official, OfficialRecipe, schedule_of
from recurx.patching.probe import probe_forward, undisturbed
from recurx.proof import without_compile
from recurx.schedule import Schedule
from recurx.survey import HOOKS

_FACTORS = ("lambda_", "noise_scale")


class EqR(Official):
    """Adapter of EqR's code (see `Adapter`): TRM whose `L_level` damps what it writes, with noise.

    Source: arXiv 2605.21488.
    """

    needed = ("embed_tokens", "lm_head", "q_head", "L_level", "config")
    carry_takes = ("batch_size", "device")
    embed_takes = ("input_ids",)
    one_q = draws = True

    def resembles(self, module: nn.Module) -> bool:
        level = module._modules.get("L_level")
        return "lm_head" in module._modules and all(hasattr(level, name) for name in _FACTORS)

    def nets(self, module: Any) -> dict[str, str]:
        return {"L": "L_level.layers"}

    def schedule(self, module: Any, variant: str, states: int) -> Schedule:
        cycles = self.settings(module).H_cycles, self.settings(module).L_cycles
        damping, noise = (float(getattr(module.L_level, name)) for name in _FACTORS)
        return schedule_of(variant, states, *cycles, damping=damping, noise=noise)

    def differences(self, module: Any) -> list[str]:
        found = super().differences(module)
        tables = module.rotary_emb() if hasattr(module, "rotary_emb") else ()
        if not all(isinstance(table, Tensor) for table in tables):
            found.append("its rotary tables turn halves of a head apart, which has no spelling")
        return found + [why for why in [_hooked(module)] if why]

    def recipe(self, module: Any, backend: str) -> OfficialRecipe:
        code = Code(without_compile(module.L_level), "forward", _FACTORS).before
        return dataclasses.replace(super().recipe(module, backend), around=code)

    def why_not(self, module: Any, recipe: OfficialRecipe, carry: Any, nets: Any) -> str | None:
        level = without_compile(module.L_level)
        return _hooked(module) or changed(level, "forward", recipe.around)

    def describe(self, module: Any, recipe: OfficialRecipe) -> list[str]:
        found = super().describe(module, recipe)
        if module.L_level.noise_scale:
            found.append(
                f"noise of {module.L_level.noise_scale}: drawn by recurx, from a counter, under a "
                "seed from PyTorch's generator; of the same law as torch.randn's, other numbers"
            )
        return found

    def probe(self, module: Any, recipe: OfficialRecipe) -> str:
        """Without noise; and that the noise of `L_level` is a scaled torch.randn that is added."""
        level = without_compile(module.L_level)
        scale, level.noise_scale = level.noise_scale, 0.0
        try:
            said = probe_forward(module, self)
            if "not probed" not in said and scale:
                _check_noise(module, level)
        finally:
            level.noise_scale = scale
        return f"{said}; without noise" if scale else said


def _hooked(module: Any) -> str | None:
    own = vars(without_compile(module.L_level))
    hooked = any(own[name] for name in HOOKS) or "forward" in own
    return "`L_level` has hooks or a `forward` of its own" if hooked else None


def _check_noise(module: Any, level: Any) -> None:
    start = module.H_init.float()
    h = start.expand(2, module.config.seq_len, len(start))
    tables = {"cos_sin": module._cos_sin()}
    found = []
    with undisturbed(module, False), torch.no_grad():
        for level.noise_scale in (0.0, 0.5):
            torch.manual_seed(0)
            found.append(level(h, h, **tables))
        torch.manual_seed(0)
        noise = 0.5 * torch.randn_like(h)
    if not torch.allclose(found[1] - found[0], noise, atol=1e-5):
        raise UnsupportedModel("its noise is no torch.randn times `noise_scale` that is added")


class URM(Official):
    """Adapter of URM's code (see `Adapter`): one state, blocks with a convolution in the MLP.

    Source: arXiv 2512.14693, section 3.
    """

    needed = (
        "embed_tokens", "lm_head", "q_head", "layers", "config", "puzzle_emb_len", "init_hidden",
    )  # fmt: skip
    single = "current_hidden"

    def resembles(self, module: nn.Module) -> bool:
        return "lm_head" in module._modules and "init_hidden" in module._buffers

    def variant(self, module: nn.Module) -> str | None:
        return "urm"

    def starts(self, module: nn.Module) -> list[str]:
        return ["init_hidden"]

    def nets(self, module: Any) -> dict[str, str]:
        return {"L": "layers"}

    def renewed(self, carry: Any, new: dict[str, Tensor]) -> Any:
        return dataclasses.replace(carry, **new)

    def why_not(self, module: Any, recipe: OfficialRecipe, carry: Any, nets: Any) -> str | None:
        blocks = [b for net in nets.values() if isinstance(net, Net) for b in net.spec.blocks]
        if carry.current_hidden.dtype.itemsize < 4 and any(
            b.conv_dtype == "float32" for b in blocks
        ):
            return "its convolution in fp32 turns its states into fp32"
        return None
