"""What the phases measure and prove. RECURX_GPU_CHECK_SIZES names a JSON file with others."""

from __future__ import annotations

import json
import os
from pathlib import Path

PATIENCE = 1  # times the limit of each phase
BUILD_MODULE = True  # recurx._C, which takes minutes
CASE = "trm-att"  # of recurx/bench/cases.py
PROVED_CASES = ("trm-att", "trm-mlp")
PROVED_BATCHES = (1, 2, 66)  # one CTA, two, more samples than a wave of clusters holds
SMALL_CASE = "small-256"  # under the sanitizer, which slows every access
RERUNS, SMALL_RERUNS = 20, 2
BATCHES = (64, 1, 8, 512, 132, 66, 60)  # most wanted first
SECONDS = 4.0  # of rounds, a batch
# (case, mode, batch, way): torch.compile of one net call, all at once.
COMPILED = (
    *(("trm-att", "step", batch, way) for batch in (1, 8, 64, 512)
      for way in ("compile", "reduce-overhead")),
    ("trm-att", "train", 768, "compile"),
    ("arc", "step", 64, "compile"),
)  # fmt: skip
LATER = (("trm-att", "train", 768), ("arc", "step", 64))
SANITIZED_BESIDE = ("triton-tiled",)
POISON_BYTES = 256 << 20  # of NaN, which the allocator hands out next
# Of limits.py; `swept`: bytes that all multiprocessors read, within and beyond the L2.
MICRO = dict(
    rounds=2000, tape_bytes=14 << 20, sweeps=8,
    swept=(14 << 20, 40 << 20, 200 << 20),
)  # fmt: skip

if os.environ.get("RECURX_GPU_CHECK_SIZES"):  # of tests
    _others = json.loads(Path(os.environ["RECURX_GPU_CHECK_SIZES"]).read_text())
    assert _others.keys() <= globals().keys(), _others.keys() - globals().keys()
    globals().update(_others)
