"""The profiler on a real GPU: stages are kernel times; with the idle time they make the step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from device_sizes import SMALL

import recurx
from recurx.models import TRM, TRMConfig

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("train", [False, True])
def test_kernels_by_stage(train: bool, tmp_path: Path) -> None:
    small = dict(hidden_size=64, num_heads=1, puzzle_emb_ndim=64) if SMALL else {}
    config = TRMConfig.sudoku_att(batch_size=4, H_cycles=2, L_cycles=2, **small)
    model: Any = TRM(config, backend="eager").cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4) if train else None
    found = recurx.profile(
        model, batch_size=4, train=train, optimizer=optimizer, seconds=2.0, compare=False
    )
    print(found)
    assert sum(row.ms for row in found.rows) + found.idle_ms >= 0.95 * found.ms
    in_stages = sum(row.launches for row in found.rows if row.ms)
    assert found.launches and in_stages >= 0.95 * found.launches
    for name in ("qkv", "rope", "attention", "o", "gate_up", "swiglu", "down", "norm", "inject"):
        assert found.row(name).ms > 0, name
    assert 0 < found.row("gate_up").of_roof <= 1.2
    found.save_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(e.get("cat") == "kernel" for e in events) == found.launches


def test_nvtx_ranges() -> None:
    from recurx.bench.profiler import nvtx_ranges

    model = TRM(TRMConfig.tiny(7, 9)).cuda().eval()
    batch = {"inputs": torch.zeros(2, 9, dtype=torch.int32, device="cuda")}
    with nvtx_ranges(model), torch.no_grad():
        model(model.initial_carry(batch), batch)
