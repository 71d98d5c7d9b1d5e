"""The in-kernel timeline: which phase of which call ran when, as the owner kernel wrote it."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from recurx.backends.cuda_abi import PHASES, RxEvent, RxRecursion


class KernelTimeline:
    """What the launches of a `with backend.timeline()` block wrote."""

    def __init__(self, events_per_owner: int) -> None:
        self.events_per_owner = events_per_owner
        self.buffers: list[Tensor] = []

    def record(self, p: RxRecursion, owners: int, device: torch.device) -> None:
        """Let the launch of `p` write into a buffer of its own."""
        size = owners * self.events_per_owner * ctypes.sizeof(RxEvent)
        self.buffers.append(torch.zeros(size, dtype=torch.uint8, device=device))
        p.timeline, p.timeline_events = self.buffers[-1].data_ptr(), self.events_per_owner

    @property
    def events(self) -> list[dict[str, int | str]]:
        """{"owner", "call", "block", "phase", "sample", "start_ns", "end_ns"} of each phase.

        Launch after launch, owner after owner, in the order of time. Waits for the device.
        """
        found = []
        for buffer in self.buffers:
            raw = buffer.cpu().numpy().tobytes()
            records = (RxEvent * (len(raw) // ctypes.sizeof(RxEvent))).from_buffer_copy(raw)
            for index, event in enumerate(records):
                if event.end_ns:
                    said = {name: getattr(event, name) for name, _ in RxEvent._fields_}
                    said["phase"] = PHASES[event.phase]
                    found.append({"owner": index // self.events_per_owner, **said})
        return found
