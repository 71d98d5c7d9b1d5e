"""recurx.patch on nano-trm itself, by its own training step, validation step and EMA callback.

RECURX_OFFICIAL_NANO names a checkout of olivkoch/nano-trm. What it imports beyond torch and einops
is stood in for where it is not installed: Lightning's module keeps settings and logs nothing.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recurx
from recurx.patching.handle import installed
from tests.lookalike_nano import Settings

SIZES = dict(
    hidden_size=64, num_layers=2, num_heads=2, max_grid_size=4, H_cycles=2, L_cycles=3,
    N_supervision=4, N_supervision_val=4, puzzle_emb_dim=64, puzzle_emb_len=2, vocab_size=7,
    num_puzzles=5, batch_size=4, pad_value=0, seq_len=16, warmup_steps=4, learning_rate=1e-3,
)  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "1d": {}, "2d": {"pos_emb_type": "2d"}, "mlp": {"use_mlp_t": True, "pos_emb_type": None},
    "conv": {"use_conv_swiglu": True},
    "no puzzles": {"puzzle_emb_dim": 0, "puzzle_emb_len": 0},
}  # fmt: skip


class LightningModule(nn.Module):
    """As much of Lightning's as the code uses without a trainer."""

    def save_hyperparameters(self) -> None:
        given = inspect.currentframe().f_back.f_locals  # type: ignore[union-attr]
        names = inspect.signature(type(self).__init__).parameters
        self.hparams = Settings({name: given[name] for name in names if name != "self"})

    def optimizers(self) -> Any:
        raise RuntimeError("no trainer")

    def log(self, *_: Any, **__: Any) -> None:
        pass


class Callback:
    pass


def _stand_ins() -> dict[str, ModuleType]:
    made = {}
    for name, values in {
        "lightning": {"LightningModule": LightningModule, "Callback": Callback, "Trainer": object},
        "sklearn": {"metrics": None},
        "src.nn.utils": {"RankedLogger": lambda *_, **__: importlib.import_module("logging"),
                         "__path__": [f"{os.environ['RECURX_OFFICIAL_NANO']}/src/nn/utils"]},
    }.items():  # fmt: skip
        try:
            if name.startswith("src"):
                raise ImportError
            importlib.import_module(name)
        except ImportError:
            made[name] = ModuleType(name)
            vars(made[name]).update(values)
    return made


@pytest.fixture(scope="module")
def nano() -> Iterator[dict[str, Any]]:
    checkout = os.environ.get("RECURX_OFFICIAL_NANO")
    if not checkout:
        pytest.skip("RECURX_OFFICIAL_NANO does not point to a checkout of nano-trm")
    before = set(sys.modules)
    sys.path.insert(0, checkout)
    try:
        sys.modules.update(_stand_ins())
        model = importlib.import_module("src.nn.models.trm")
        ema = importlib.import_module("src.nn.callbacks.ema")
        yield {"module": model, "class": model.TRMModule, "ema": ema.EMACallback}
    finally:
        sys.path.remove(checkout)
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("src", "lightning", "sklearn"):
                del sys.modules[name]


def build(nano: dict[str, Any], **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nano["class"](**SIZES | changes)
    with torch.no_grad():  # starts at zero, which would hide a fault
        model.q_head.weight.normal_()
    model.total_steps = 100
    return model


def batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 7, (2, 4, 16), generator=generator, dtype=torch.int32)
    return {"input": tokens[0], "output": tokens[1].long(),
            "puzzle_identifiers": torch.arange(4, dtype=torch.int32)}  # fmt: skip


def train(model: Any, ema: Any, steps: int = 24) -> list[Tensor]:
    """Losses and carries of their training step, validation under EMA, and the weights after."""
    torch.manual_seed(5)
    model._optimizers = model.configure_optimizers()
    averager, trace = ema(decay=0.9), []
    averager.on_fit_start(None, model)
    for step in range(steps):
        trace.append(model.training_step(batch(step), step).detach())
        trace += [model.carry.inner_carry.z_H, model.carry.inner_carry.z_L, model.carry.steps]
        averager.on_train_batch_end(None, model, None, None, step)
    model.eval()
    averager.on_validation_epoch_start(None, model)
    found = model.validation_step(batch(99), 0)
    averager.on_validation_epoch_end(None, model)
    trace += [torch.tensor(found[name], dtype=torch.float64) for name in sorted(found)]
    return trace + [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_their_training_patched_and_not(nano: dict[str, Any], kind: str, backend: str) -> None:
    # AdamW divides by gradients' size: an engine's other rounding grows tenfold every few steps.
    steps, tolerance = (24, 0.0) if backend == "eager" else (2, 1e-3)
    want = train(build(nano, **KINDS[kind]), nano["ema"], steps)
    with recurx.patch(nano["class"], backend=backend) as handle:
        model = build(nano, **KINDS[kind])
        assert installed(model, "inner_forward") is not None, handle.report
        got = train(model, nano["ema"], steps)
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1)
        assert error <= tolerance, f"value {number} of the trace differs by {error}"


def test_what_it_can_be_that_is_not_known_is_refused(nano: dict[str, Any]) -> None:
    with (
        recurx.patch(nano["module"]),
        pytest.warns(UserWarning, match=r"mlp` has a child `board_conv`"),
    ):
        model = build(nano, use_board_swiglu=True)
    assert installed(model, "inner_forward") is None
    assert torch.isfinite(train(model, nano["ema"], 2)[0])
