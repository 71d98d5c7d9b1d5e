"""The process that holds one variant of one case. Started by the runner, one command a line.

One variant a process, because compilers leave settings behind. Commands and replies are JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any

import torch

from recurx.bench import ceilings, counters, reference, subjects
from recurx.bench.variants import Variant

FLUSH_BYTES = 256 << 20  # more than any L2


class Worker:
    def __init__(
        self, case: str, mode: str, variant: str, batch: int, device: str, unit: str, threads: int,
        folder: str, imports: list[str],
    ) -> None:  # fmt: skip
        torch.set_num_threads(threads)
        for module in imports:
            importlib.import_module(module)
        engine, _, dtype = variant.partition("/")
        self.variant, self.device, self.unit = Variant(engine, dtype), device, unit
        self.case, self.mode, self.batch, self.folder = case, mode, batch, folder
        self.subject: Any = None
        self.flush: torch.Tensor | None = None

    # ---- of the group, once ------------------------------------------------------------------

    def reference(self, output: str) -> dict[str, Any]:
        """Write the exact results to `output`."""
        with torch.set_grad_enabled(self.mode != "step"):
            found = reference.outputs(self.case, self.mode, self.batch, self.device, self.folder)
        torch.save(found, output)
        return {}

    def ceilings(self, rows: int, hidden: int, inner: int) -> dict[str, Any]:
        return ceilings.ceilings_of(self.device, rows, hidden, inner)

    # ---- of a variant ------------------------------------------------------------------------

    def start(self, output: str) -> dict[str, Any]:
        """Build and take the first step: its results go to `output`. Its seconds include packing
        and compiling, its memory packed weights and scratch."""
        self.subject = subjects.subject(
            self.case, self.mode, self.variant, self.batch, self.device, self.unit, self.folder
        )
        torch.manual_seed(2)  # of the exploration of halting
        memory = counters.Memory(self.device)
        begin = time.perf_counter()
        self.subject.step()
        self._wait()
        seconds = time.perf_counter() - begin
        peak = memory.peak()
        torch.save(self.subject.outputs(), output)
        return {"first_seconds": seconds, **peak, **self.subject.facts()}

    def time(self, repeats: int, cold: bool = False) -> dict[str, Any]:
        """Seconds a step, the mean of `repeats` steps one after the other."""
        if cold:
            return {"seconds": self._time_cold(repeats)}
        self._wait()
        begin = time.perf_counter()
        for _ in range(repeats):
            self.subject.step()
        self._wait()
        return {"seconds": (time.perf_counter() - begin) / repeats}

    def _time_cold(self, repeats: int) -> float:
        """By events around each step, with the GPU's L2 overwritten before it."""
        if self.flush is None:
            self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        pairs = []
        for _ in range(repeats):
            self.flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.subject.step()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return sum(1e-3 * start.elapsed_time(end) for start, end in pairs) / repeats

    def count(self, seconds: float) -> dict[str, Any]:
        """Launches, the memory of a later step, and energy over about `seconds`."""
        way = self.variant.way
        compiled = way is not None and way.compile is not None
        found = counters.launches(self.subject.step, self.device, compiled)
        if self.device == "cuda":
            found |= self._device_memory()
        return found | counters.energy(self.subject.step, self.device, seconds)

    def _device_memory(self) -> dict[str, Any]:
        """Peak of a later step, since the first one's includes the compiler's trials; and what
        stays reserved.

        A replayed graph allocates nothing, its memory is in the pool of its recording: then the
        first step's peak stands, which was not replayed, and `reserved_mib` has the pool.
        """
        found: dict[str, Any] = {}
        memory = counters.Memory(self.device)
        self.subject.step()
        self._wait()
        captured = self.variant.captured or (self.mode == "train" and self.variant.ours)
        if not captured:
            found |= memory.peak()
        torch.cuda.empty_cache()
        self.subject.step()
        self._wait()
        return found | {"reserved_mib": round(torch.cuda.memory_reserved() / 2**20, 1)}

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    arguments = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers print to standard output; keep replies apart
    try:
        worker = Worker(**arguments)
        for line in sys.stdin:
            command = json.loads(line)
            reply = getattr(worker, command.pop("do"))(**command)
            print(json.dumps(reply), file=replies, flush=True)
    except Exception as error:  # whatever a backend or compiler meets becomes the row's reason
        text = (str(error).strip().splitlines() or ["no message"])[0]
        print(json.dumps({"error": f"{type(error).__name__}: {text}"}), file=replies, flush=True)
        raise


if __name__ == "__main__":
    main()
