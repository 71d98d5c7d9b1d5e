"""The in-kernel timeline of backend="cuda" in a profile: the real kernel and backend, emulated."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

import recurx
from emulator.build import unavailable
from emulator.owner import emulate, installed
from recurx.backends.cuda_abi import PHASES
from recurx.bench.profiler.trace import chrome_trace
from recurx.models import TRM, TRMConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
]


def test_the_kernels_own_phases_are_in_the_trace() -> None:
    """Two samples, two calls, two blocks: every owner tells every phase of every call."""
    cuda = emulate(((64, 1),), checked=False, flags=("-DRX_TIMELINE=1",))
    torch.manual_seed(0)
    config = TRMConfig.tiny(7, 9, H_cycles=1, L_cycles=1, forward_dtype="bfloat16")
    with installed(cuda):
        found = recurx.profile(
            TRM(config, backend="cuda"), batch_size=2, seconds=0.05, halting_steps=0, compare=False
        )
    assert found.timeline is not None
    samples = {event["sample"] for event in found.timeline.events}
    assert samples == {0, 1}
    counted = Counter(event["phase"] for event in found.timeline.events)
    blocks = 2 * 2 * 2
    stages = dict.fromkeys(("qkv", "attention", "o", "gate_up", "down"), blocks)
    assert counted == {"input": 4, "store": 4} | stages
    (engine,) = found.engines
    assert engine.label.startswith("cuda: forward of calls 0..1 of 2")
    assert {phase for phase, _, _ in engine.phases} - {"(between phases)"} == set(counted)
    assert set(counted) <= set(PHASES)
    assert sum(ms for _, ms, _ in engine.phases) == pytest.approx(engine.ms)
    events = [e for e in chrome_trace(found)["traceEvents"] if e.get("cat") == "phase"]
    assert len(events) == len(found.timeline.events)
    for owner in found.timeline.owners:
        own = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["tid"] == owner)
        assert all(end <= start + 1e-9 for (_, end), (start, _) in itertools.pairwise(own))
