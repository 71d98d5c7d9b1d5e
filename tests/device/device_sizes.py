"""Sizes of the tests in this folder: of published nets, or few of everything over a double."""

from __future__ import annotations

import os

import torch

SMALL = os.environ.get("RECURX_DEVICE_SIZES") == "small"
PUBLISHED = dict(tokens=97, hidden=512, inner=1536, heads=8, token_inner=512)
if SMALL:
    PUBLISHED = dict(tokens=33, hidden=128, inner=256, heads=2, token_inner=64)
SHAPE = {name: PUBLISHED[name] for name in ("tokens", "hidden")}
HEAD_DIM = PUBLISHED["hidden"] // PUBLISHED["heads"]
RERUNS = int(os.environ.get("RECURX_RERUNS", "2" if SMALL else "300"))


def waves(share: float) -> int:
    """So many samples for each multiprocessor of this device, and one more."""
    return 1 + int(share * torch.cuda.get_device_properties(0).multi_processor_count)
