"""RSM and SIC, whose recursion lies in other methods and with other windows."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from recurx.operands import CosSin
from recurx.patching.adapter import signature_difference
from recurx.patching.handle import fall_back
from recurx.patching.official import (
    Official,
    OfficialRecipe,
    net_differences,
    schedule_of,
    specs_of,
)
from recurx.patching.probe import cheap, probe_method, random_batch
from recurx.patching.sharded import Values, run_recursion
from recurx.problem import Problem
from recurx.schedule import Schedule


class RSM(Official):
    """Adapter of RSM's code (see `Adapter`): TRM's calls from fixed starts, the window of the last
    cycle or, where its stochastic transition is on, one call more. Source: arXiv 2603.15641."""

    needed = ("embed_tokens", "lm_head", "core", "cfg", "puzzle_emb_len", "H_init", "L_init")
    takes = ("carry", "batch", "override_H_cycles", "debug_structure", "alpha")
    carry_takes = ()
    embed_takes = ("tokens", "puzzle_ids")

    def settings(self, module: Any) -> Any:
        return module.cfg

    def resembles(self, module: nn.Module) -> bool:
        return {"core", "lm_head"} <= module._modules.keys()

    def resembles_class(self, cls: type) -> bool:
        return all(hasattr(cls, n) for n in ("_input_embeddings", "puzzle_embedding_module"))

    def nets(self, module: Any) -> dict[str, str]:
        return {"L": "core"}

    def replacement(self, recipe: OfficialRecipe) -> Callable[..., object]:
        adapter = self

        def forward(
            self: Any,
            carry: Any,
            batch: Mapping[str, Tensor],
            override_H_cycles: int | None = None,
            debug_structure: bool = False,
            alpha: float = 1.0,
        ) -> Any:
            tables = self.rotary_emb() if recipe.rope and hasattr(self, "rotary_emb") else None
            nets, cfg = adapter.bound(self, recipe, tables), self.cfg
            cycles = int(cfg.H_cycles if override_H_cycles is None else override_H_cycles)
            cycles = max(2, cycles) if self.training else cycles
            if debug_structure or cycles < 1:
                nets = "it is asked to print what it does, or for no cycle"
            if isinstance(nets, str):
                method = fall_back(self, recipe, "forward", nets)
                return method(carry, batch, override_H_cycles, debug_structure, alpha)
            draws = self.training and cfg.prob_detach_prev_H > 0
            transition = not (draws and torch.rand(1).item() < cfg.prob_detach_prev_H)
            window = cfg.L_cycles + 1 + (transition and cycles > 1)
            schedule = schedule_of("trm", 2, cycles, cfg.L_cycles, window)
            x = adapter.embed(self, batch)
            starts = {"z_H": self.H_init, "z_L": self.L_init}
            carried = {name: start.expand_as(x) for name, start in starts.items()}
            with torch.autocast("cuda", self.forward_dtype):
                states: Any = run_recursion(recipe, schedule, nets, x, carried, tables)
                logits = self.lm_head(states["z_H"])[:, self.puzzle_emb_len :]
            return type(carry)(current_data=batch), {"logits": logits}

        forward.recurx_recipe = recipe  # type: ignore[attr-defined]
        return forward

    def results(self, output: Any) -> dict[str, Tensor]:
        return {"logits": output[1]["logits"]}

    def probe(self, module: Any, recipe: OfficialRecipe) -> str:
        """With the transition in evaluation, without it in training."""
        if module.H_init.is_meta:
            return "not probed: the weights are on the meta device"
        generator, cfg = torch.Generator().manual_seed(0), module.cfg
        batch = random_batch(cfg, 2, generator, module.H_init.device)
        counts = min(3, cfg.H_cycles), min(2, cfg.L_cycles)
        with _settled(module), cheap(module, cfg, *counts), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its autocast says that there is no GPU
            arguments = (module.initial_carry(batch), batch)
            return probe_method(module, self, arguments, "{} x {} cycles, B=2".format(*counts))


@contextlib.contextmanager
def _settled(module: Any) -> Iterator[None]:
    """Starts in fp32 on a CPU, no transition in training, embeddings of evaluation."""
    cfg, buffers = module.cfg, dict(module._buffers)
    chance, embed = cfg.prob_detach_prev_H, type(module)._input_embeddings
    narrow = module.H_init.device.type == "cpu" and module.H_init.dtype.itemsize < 4

    def embedded(*given: Tensor) -> Tensor:
        if (puzzles := module._modules.get("puzzle_emb")) is not None:
            puzzles.training = False  # in training it takes its own batch size only
        return embed(module, *given)  # type: ignore[no-any-return]

    try:
        cfg.prob_detach_prev_H, module._input_embeddings = 1.0, embedded
        for name in ("H_init", "L_init"):
            module._buffers[name] = buffers[name].float() if narrow else buffers[name]
        yield
    finally:
        del module._input_embeddings
        cfg.prob_detach_prev_H = chance
        module._buffers.update(buffers)


class SIC(Official):
    """Adapter of SIC's code (see `Adapter`): `core`, one cycle, through which gradient flows.

    Source: arXiv 2601.19085.
    """

    method = "core"
    follows = ("L_cycles", "core_damping")
    needed = ("reasoning", "head", "q_head", "embed_tokens", "config", "H_init", "L_init")

    def resembles(self, module: nn.Module) -> bool:
        return {"reasoning", "head", "q_head"} <= module._modules.keys()

    def resembles_class(self, cls: type) -> bool:
        return all(hasattr(cls, name) for name in ("core", "run_h_cycles", "wta_forward"))

    def differences(self, module: Any) -> list[str]:
        found = [f"it has no `{name}`" for name in self.needed if not hasattr(module, name)]
        found += signature_difference(module, "core", ["input_emb", "z_H", "z_L", "cos_sin"])
        if not found and module.config.anchor_seq_index is not None:
            found.append("it sets a token back at every call (`anchor_seq_index`)")
        return found or net_differences("reasoning", module.reasoning, module.rope is not None)

    def schedule(self, module: Any, variant: str, states: int) -> Schedule:
        damping = module.config.core_damping or 1.0  # it damps if that is above 0
        return schedule_of("sic", 2, 1, module.config.L_cycles, damping=damping)

    def nets(self, module: Any) -> dict[str, str]:
        return {"L": "reasoning"}

    def recipe(self, module: Any, backend: str) -> OfficialRecipe:
        return OfficialRecipe(
            self.schedule(module, "sic", 2), (1, module.config.L_cycles), backend, variant="sic",
            states=(("z_H", "z_H"), ("z_L", "z_L")), nets=(("L", "reasoning"),), output="z_H",
            rope=module.rope is not None,
        )  # fmt: skip

    def problem(self, module: Any, recipe: OfficialRecipe) -> Problem:
        start, specs = module.H_init, tuple(specs_of(module, recipe.nets, recipe.rope))
        return Problem(
            recipe.schedule, specs, 1, module.config.total_seq_len, start.shape[-1], start.dtype,
            start.device.type, rope=recipe.rope, needs_grad=module.training,
        )  # fmt: skip

    def replacement(self, recipe: OfficialRecipe) -> Callable[..., object]:
        adapter = self

        def core(self: Any, input_emb: Tensor, z_H: Tensor, z_L: Tensor, cos_sin: Any) -> Any:
            tables = _whole(cos_sin, input_emb.shape[-2])
            nets: Any = tables
            if not isinstance(tables, str):
                nets = adapter.bound(self, recipe, tables)
            if isinstance(nets, str):
                return fall_back(self, recipe, "core", nets)(input_emb, z_H, z_L, cos_sin)
            schedule, carried = adapter.schedule(self, "sic", 2), {"z_H": z_H, "z_L": z_L}
            z = cast(Values, run_recursion(recipe, schedule, nets, input_emb, carried, tables))
            q_halt = self.q_head(z["z_H"][:, self.config.q_halt_seq_index]).squeeze(-1)
            return self.head(z["z_H"]), q_halt, z["z_H"], z["z_L"]

        core.recurx_recipe = recipe  # type: ignore[attr-defined]
        return core

    def results(self, output: Any) -> dict[str, Tensor]:
        return dict(zip(("logits", "q_halt", "z_H", "z_L"), output, strict=True))

    def probe(self, module: Any, recipe: OfficialRecipe) -> str:
        start = module.H_init
        if start.is_meta:
            return "not probed: the weights are on the meta device"
        generator = torch.Generator().manual_seed(0)
        shape = 2, module.config.total_seq_len, start.shape[-1]
        how: Any = {"generator": generator, "device": "cpu"}
        given = [torch.randn(shape, **how).to(start.device).requires_grad_() for _ in range(3)]
        tables = module._get_cos_sin(start.device)
        return probe_method(module, self, (*given, tables), "one cycle")


def _whole(tables: Any, tokens: int) -> CosSin | str | None:
    """Tables of pairs [T, 1, head_dim / 2] as [T, head_dim] in fp32; or why there are none."""
    if tables is None:
        return None
    if any(t.requires_grad or t.ndim != 3 or t.shape[:2] != (tokens, 1) for t in tables):
        return "its rotary tables are learned, or one a head"
    cos, sin = (torch.cat((t, t), dim=-1).squeeze(-2).float() for t in tables)
    return cos, sin
