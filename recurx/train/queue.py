"""Samples waiting on the device: halted slots take theirs there, in order, without the host.

The host puts chunks of fresh samples into a ring; the device counts what was taken. The host learns
that count late, through copies that it never waits for unless the ring could run dry, and assumes
the worst until then. Chunks always have the same size, so the samples and their order do not depend
on when the host came to know anything.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from recurx import small_ops
from recurx.errors import bad_argument
from recurx.train.ranks import Ranks

Draw = Callable[[int], Mapping[str, Tensor]]  # {key: [count, ...]} of the next `count` samples
CHUNKS = {"cpu": 2}  # chunks in the ring; a device runs ahead of what the host knows
MORE_CHUNKS = 8


class SampleQueue:
    """A ring of samples on `device`, filled by `draw` in chunks of `slots`.

    Args:
        draw: gives the next samples of an endless stream, as CPU tensors of fixed shapes.
        slots: samples that one step may take at most, B.
        device: where the ring lies.
        ranks: processes that share the `slots`; each takes what its own slots get.
        chunks: size of the ring in chunks of B, at least 2.
    """

    def __init__(
        self,
        draw: Draw,
        slots: int,
        device: torch.device | str = "cpu",
        chunks: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.draw, self.slots, self.device = draw, slots, torch.device(device)
        self.ranks = ranks or Ranks()
        self.own = self.ranks.own(slots)
        chunks = CHUNKS.get(self.device.type, MORE_CHUNKS) if chunks is None else chunks
        if chunks < 2 or slots < 1:
            got = f"chunks={chunks}, slots={slots}"
            raise bad_argument("train.SampleQueue", "chunks", "at least 2, of at least 1 slot", got)
        self.capacity = chunks * slots
        self.cursor = torch.zeros((), dtype=torch.int64, device=self.device)  # samples taken
        self.put = 0  # samples ever put in
        self._known = 0  # samples known to be taken
        self._news: collections.deque[tuple[Tensor, Any]] = collections.deque()
        self.ring: dict[str, Tensor] = {}

    def take(self, halted: Tensor) -> dict[str, Tensor]:
        """{key: [B, ...]}: a fresh sample at every slot that halted, anything valid elsewhere.

        Runs on the device alone: it can be captured. halted: [B] bool, of this rank's slots.
        """
        halted = self.ranks.gather(halted)
        if small_ops.on_triton(halted):
            from recurx.kernels.queue_take import queue_take

            index = queue_take(halted, self.cursor, self.capacity)
        else:
            ends = halted.long()
            index = (self.cursor + ends.cumsum(0) - ends) % self.capacity
            self.cursor.add_(ends.sum())
        index = index[self.own]
        return {key: values.index_select(0, index) for key, values in self.ring.items()}

    def refill(self) -> None:
        """Put chunks in while there is surely room; call before every step.

        Waits for the device only if the next step could find the ring empty.
        """
        self._listen(wait=False)
        while True:
            while self.put - self._known + self.slots <= self.capacity:
                self._append(self.draw(self.slots))
            if self.put - self._most_taken() >= self.slots:
                return
            self._listen(wait=True)

    def stepped(self) -> None:
        """Call after every step: asks the device how many samples it has taken by now."""
        if self.device.type != "cuda":
            self._news.append((self.cursor.clone(), None))
            return
        said = torch.empty((), dtype=torch.int64, pin_memory=True)
        said.copy_(self.cursor, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self._news.append((said, event))

    def _most_taken(self) -> int:
        """The most that may be taken by now, steps in flight included."""
        return self._known + self.slots * len(self._news)

    def _listen(self, wait: bool) -> None:
        while self._news and (wait or self._news[0][1] is None or self._news[0][1].query()):
            said, event = self._news.popleft()
            if event is not None:
                event.synchronize()
            self._known, wait = int(said), False

    def _append(self, samples: Mapping[str, Tensor]) -> None:
        count = next(iter(samples.values())).shape[0]
        if not self.ring:
            self.ring = {
                key: torch.zeros(self.capacity, *v.shape[1:], dtype=v.dtype, device=self.device)
                for key, v in samples.items()
            }
        start = self.put % self.capacity
        first = min(count, self.capacity - start)  # the rest goes to the beginning
        for key, values in samples.items():
            if self.device.type == "cuda":
                values = values.pin_memory()
            self.ring[key][start : start + first].copy_(values[:first], non_blocking=True)
            self.ring[key][: count - first].copy_(values[first:], non_blocking=True)
        self.put += count

    # ---- saving --------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The samples that wait, in order: {key: [count, ...]}. Waits for the device."""
        taken = int(self.cursor)
        rows = torch.arange(taken, self.put, device=self.device) % self.capacity
        return {key: values[rows] for key, values in self.ring.items()}

    def load(self, waiting: Mapping[str, Tensor]) -> None:
        """Go on with the samples that another queue of this stream had waiting (maybe none)."""
        self._news.clear()
        self.put = self._known = 0
        self.cursor.zero_()
        count = next((v.shape[0] for v in waiting.values()), 0)
        if count > self.capacity:  # of a device with a longer ring
            self.capacity = -(-count // self.slots) * self.slots
            self.ring = {}
        if count:
            self._append({key: values.cpu() for key, values in waiting.items()})
