"""Official code, unpatched: every stage is found, nothing is left over. Needs checkouts, see
`tests/official.py`."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import recurx
from recurx.bench.profiler.attribute import STAGES
from recurx.train import AdamATan2
from tests import official
from tests.bench.profiler.profile_cases import (
    ATTENTION_STAGES,
    BLOCK_STAGES,
    TOKEN_STAGES,
    kernels_of,
)

# system, changes, net calls, blocks of all calls
CASES = [
    ("trm", {}, 9, 18),
    ("trm", {"mlp_t": True, "pos_encodings": "none"}, 9, 18),
    ("trm", {"pos_encodings": "learned"}, 9, 18),
    ("single_z", {}, 9, 18),
    ("hier6", {}, 21, 42),
    ("hrm", {}, 9, 18),
    ("hrm_in_trm", {"mlp_t": True}, 9, 18),
]


def build(system: str, changes: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    parts = official.load(system)
    torch.manual_seed(0)
    head = parts["loss"](
        parts["model"](official.config(system, **changes)), "stablemax_cross_entropy"
    )
    return head, official.batch()


@pytest.mark.parametrize("system,changes,calls,blocks", CASES)
def test_official_code_by_stage(
    system: str, changes: dict[str, Any], calls: int, blocks: int
) -> None:
    model, batch = build(system, changes)
    found = recurx.profile(model, batch, seconds=0.05, halting_steps=0, compare=False)
    assert [c.call for c in found.calls] == list(range(calls))
    names = {row.name for row in found.rows}
    assert names <= set(STAGES)
    mixer = TOKEN_STAGES if changes.get("mlp_t") else ATTENTION_STAGES
    if changes.get("pos_encodings") == "learned":
        mixer = mixer - {"rope"}
    assert mixer | BLOCK_STAGES | {"act", "embedding", "lm_head", "q_head", "loss"} <= names
    assert found.row("other").operators <= 1
    for name in ("gate_up", "down"):
        assert kernels_of(found, name)["mm"] == blocks
    assert kernels_of(found, "swiglu") == {"silu": blocks, "mul": blocks}
    norms = blocks if changes.get("mlp_t") else 2 * blocks
    assert kernels_of(found, "norm") == {
        "add": 2 * norms, "pow": norms, "mean": norms, "rsqrt": norms, "mul": norms
    }  # fmt: skip
    if "rope" in mixer:
        assert kernels_of(found, "rope")["neg"] == 2 * blocks
        assert kernels_of(found, "attention").keys() <= {
            "_scaled_dot_product_flash_attention_for_cpu", "clone"
        }  # fmt: skip


def test_official_training_step() -> None:
    model, batch = build("trm", {})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = recurx.profile(
        model, batch, train=True, optimizer=optimizer, seconds=0.05, halting_steps=0, compare=True
    )
    assert found.row("loss").forward_ms > 0 and found.row("loss").backward_ms > 0
    assert found.row("optimizer").operators and found.row("other").share < 0.05
    assert [c.call for c in found.calls if c.backward_ms] == [6, 7, 8]
    assert "Measured here" in "\n".join(found.advice)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_official_optimiser_of_puzzle_rows_and_average() -> None:
    """The training loop of the official code, step by step; its `unique` is a host sync."""
    with official.importable("trm"):
        parts = official.import_parts("trm")
        sparse = importlib.import_module("models.sparse_embedding")
        average = importlib.import_module("models.ema").EMAHelper(mu=0.999)
    torch.manual_seed(0)
    model = parts["loss"](parts["model"](official.config("trm")), "stablemax_cross_entropy").train()
    batch = official.batch()
    optimizers = [
        AdamATan2(model.parameters(), lr=1e-4),
        sparse.CastedSparseEmbeddingSignSGD_Distributed(
            model.model.puzzle_emb.buffers(), world_size=1, lr=1e-2, weight_decay=0.1
        ),
    ]
    average.register(model)
    carry = [model.initial_carry(batch)]

    def step() -> None:
        carry[0], loss, metrics, _, _ = model(carry=carry[0], batch=batch, return_keys=[])
        (loss / 4).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update(model)
        torch.stack(list(metrics.values())).cpu().numpy()

    found = recurx.profile(
        model, run=step, optimizer=optimizers, ema=average, seconds=0.05, halting_steps=0
    )
    assert kernels_of(found, "optimizer")["_unique2"] == 1
    assert kernels_of(found, "ema")["mul"] == 2 * len(list(model.parameters()))
    (unique,) = [sync for sync in found.syncs if "unique" in sync.what]
    assert "sparse_embedding.py" in unique.place and "unique(" in unique.text
    text = "\n".join(found.advice)
    assert "recurx.train.swap would replace the inside of" in text and "EMAHelper" in text
    assert found.row("other").share < 0.1
