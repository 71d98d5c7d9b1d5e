"""Loads the official TRM and HRM code from checkouts that environment variables point to.

    RECURX_OFFICIAL_TRM   a checkout of SamsungSAILMontreal/TinyRecursiveModels
    RECURX_OFFICIAL_HRM   a checkout of sapientinc/HRM

Both name their package `models`, so each import is done alone and then taken out of
`sys.modules`. HRM wants flash-attn, which needs a GPU: a stand-in calls PyTorch's attention.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

# system -> (environment variable, module)
SYSTEMS = {
    "trm": ("RECURX_OFFICIAL_TRM", "models.recursive_reasoning.trm"),
    "single_z": ("RECURX_OFFICIAL_TRM", "models.recursive_reasoning.trm_singlez"),
    "hier6": ("RECURX_OFFICIAL_TRM", "models.recursive_reasoning.trm_hier6"),
    "hrm": ("RECURX_OFFICIAL_HRM", "models.hrm.hrm_act_v1"),
    "hrm_in_trm": ("RECURX_OFFICIAL_TRM", "models.recursive_reasoning.hrm"),
}


def _flash_attn_stand_in() -> ModuleType:
    module = ModuleType("flash_attn")

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return out.transpose(1, 2).contiguous()

    module.flash_attn_func = flash_attn_func
    return module


@contextlib.contextmanager
def importable(system: str) -> Iterator[None]:
    """`models` means this system's package, inside the block only.

    Skips the calling test when the environment variable is not set.
    """
    variable = SYSTEMS[system][0]
    checkout = os.environ.get(variable)
    if not checkout:
        pytest.skip(f"{variable} does not point to a checkout of the official code")
    assert Path(checkout).is_dir(), f"{variable}={checkout} is no directory"
    sys.path.insert(0, checkout)
    sys.modules["flash_attn"] = _flash_attn_stand_in()
    try:
        yield
    finally:
        sys.path.remove(checkout)
        for name in [n for n in sys.modules if n.split(".")[0] in ("models", "flash_attn")]:
            del sys.modules[name]


def load(system: str) -> dict[str, Any]:
    """{"model": the ACT wrapper class, "loss": the loss head class, "module": the module}.

    Skips the calling test when the environment variable is not set.
    """
    with importable(system):
        return import_parts(system)


def import_parts(system: str) -> dict[str, Any]:
    """What `load` gives, inside `importable`."""
    module = importlib.import_module(SYSTEMS[system][1])
    losses = importlib.import_module("models.losses")
    wrapper = next(
        value
        for key, value in vars(module).items()
        if isinstance(value, type) and key.endswith("_ACTV1")
    )
    return {"model": wrapper, "loss": losses.ACTLossHead, "module": module}


def config(system: str, **changes: Any) -> dict[str, Any]:
    """A small official configuration: T = 18 tokens, D = 64, two heads."""
    base: dict[str, Any] = dict(
        batch_size=4, seq_len=16, vocab_size=7, num_puzzle_identifiers=5, puzzle_emb_ndim=64,
        H_cycles=3, L_cycles=6 if system == "hier6" else 2, H_layers=2, L_layers=2,
        hidden_size=64, expansion=2.0, num_heads=2, pos_encodings="rope", halt_max_steps=4,
        halt_exploration_prob=0.5, forward_dtype="float32",
    )  # fmt: skip
    if not system.startswith("hrm"):
        base |= dict(puzzle_emb_len=2, H_layers=0)
    return base | changes


def batch(size: int = 4, seq_len: int = 16, vocab: int = 7, seed: int = 5) -> dict[str, Tensor]:
    """Random inputs and labels (some ignored), and distinct puzzle ids."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocab, (size, seq_len), generator=generator)
    labels[0, :3] = -100
    return {
        "inputs": torch.randint(0, vocab, (size, seq_len), generator=generator),
        "labels": labels,
        "puzzle_identifiers": torch.arange(size, dtype=torch.int32) % 5,
    }


def states(carry: Any) -> dict[str, Tensor]:
    """The tensors of an official inner carry, by attribute."""
    return dict(vars(carry))
