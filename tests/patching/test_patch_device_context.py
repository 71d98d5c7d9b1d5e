"""Under `with torch.device(...)` recurx still makes its own tensors beside the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import recurx
from recurx import measure
from recurx.models import TRM, TRMConfig
from recurx.plan import device
from tests import lookalike, lookalike_nano
from tests.elsewhere import Elsewhere


@pytest.mark.parametrize("build", [lookalike.build, lookalike_nano.build])
def test_patch_under_a_device_context(build: Callable[[], nn.Module]) -> None:
    model = build()
    with Elsewhere():
        assert "bit-identical" in str(recurx.patch(model).report)
        recurx.explain(model)
    with torch.device("meta"):
        assert "bit-identical" in str(recurx.patch(model, backend="eager").report)


def test_lucidrains_under_a_device_context() -> None:
    from tests.patching import test_patch_lucidrains as lucid

    model = lucid.build()
    with Elsewhere():
        assert "bit-identical" in str(recurx.patch(model).report)


@pytest.mark.parametrize("module", [lookalike, lookalike_nano])
def test_watched_classes_that_are_built_under_one(module: ModuleType) -> None:
    with recurx.patch(module) as handle, Elsewhere(generators=True):
        module.build()
        assert "probed against the original" in str(handle.report)
    with recurx.patch(module) as handle, torch.device("meta"):
        module.build()
        assert "not probed: the weights are on the meta device" in str(handle.report)


def test_solving_profiling_and_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TRM(TRMConfig.tiny(7, 9))
    profiled = lookalike_nano.build()
    batch = {"inputs": torch.randint(0, 7, (3, 9))}
    monkeypatch.setattr(measure, "best_seconds", lambda run, *_, **__: [1e-3, run()][0])
    with Elsewhere():
        recurx.solve(model, batch, max_steps=2, rollouts=2, sigma=0.1, init="random")
        recurx.profile(profiled, seconds=0.05, halting_steps=1, compare=False)
        device._cpu.__wrapped__(torch.get_num_threads())
        measure.product_tflops(8, 8, 8, torch.float32, "cpu")
        measure.copy_gbs("cpu", 1 << 10)


def test_files_are_loaded_on_the_cpu_wherever_one_is(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    config = TRMConfig.tiny(7, 9)
    recurx.save_checkpoint(path, TRM(config))
    with torch.device("meta"):
        built = recurx.load_checkpoint(path, puzzle_rows=[0] if config.puzzle_emb_ndim else None)
        model = built.build()
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}


@pytest.mark.parametrize("function", ["randn", "zeros"])
def test_the_context_bites(function: str) -> None:
    with Elsewhere(), pytest.raises(RuntimeError, match="default device"):
        getattr(torch, function)(3)
    with Elsewhere(generators=True), pytest.raises(RuntimeError, match="default device"):
        torch.randn(3, generator=torch.Generator())
