"""Sequences of kernel launches on fixed buffers, captured once and replayed.

A `Recording` owns the buffers and knows how to launch; the cache decides when launching becomes
capturing. The first run of a key launches plainly (that also compiles the kernels, which a capture
must not do), the second captures, later ones replay. Capturing is an object that is handed in, so
that all of this runs, and is tested, without a GPU.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

# Tags of ops that keep memory between calls: mode="reduce-overhead" then runs them between graphs.
UNSAFE_IN_GRAPHS = tuple(filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)]))
Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]


def cuda_capture(launch: Callable[[], None]) -> Replay:
    """Capture what `launch` launches in a CUDA graph, without running it."""
    index = torch.cuda.current_device()
    stream, pool, _ = _side_of(index, stream_of(torch.device("cuda", index)))
    replay: Replay = _captured(launch, stream, pool).replay
    return replay


def _captured(launch: Callable[[], object], stream: Any, pool: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    # Thread-local: another thread may allocate or synchronise meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        launch()
    return graph


@functools.cache
def _side_of(index: int, stream: int) -> tuple[torch.cuda.Stream, Any, torch.cuda.CUDAGraph]:
    """Where graphs that a stream replays are captured: a stream and a memory pool of their own
    (why: NOTES.md), and a graph that holds the pool."""
    side, pool = torch.cuda.Stream(index), torch.cuda.graph_pool_handle()
    return side, pool, _captured(lambda: torch.zeros(1, device=f"cuda:{index}"), side, pool)


def captured_outside(device: torch.device) -> bool:
    """Whether somebody is capturing a CUDA graph of which this call becomes a part.

    So is the run before a graph that `torch.compile(mode="reduce-overhead")` will record: nothing
    may be kept that it allocates. Where PyTorch knows the tag, our ops never run there.
    """
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        capturing: bool = torch.cuda.is_current_stream_capturing()
        return capturing or (not UNSAFE_IN_GRAPHS and _before_a_graph())


def _before_a_graph() -> bool:
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None:
        return False
    try:
        manager = trees.get_manager(torch.cuda.current_device(), False)
    except AssertionError:  # a thread that never ran such a graph
        return False
    return manager is not None and manager.path_state == trees.ExecutionState.WARMUP


def stream_of(device: torch.device) -> int:
    """The current stream as a number; 0 also where there are none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class Recording:
    """Buffers, the launches on them, and their replay once they were captured."""

    def __init__(self, buffers: Any, launch: Callable[[], None]) -> None:
        self.buffers = buffers
        self._launch = launch
        self._replay: Replay | None = None
        self._launched = False  # plainly, once at least

    def run(self, capture: Capture | None) -> None:
        """Run it; `capture` None: plainly, whatever was captured before."""
        if capture is None or not self._launched:
            self._launched = True
            self._launch()
            return
        self._replay = self._replay or capture(self._launch)
        self._replay()


class RecordingCache:
    """Recordings by key, the least recently used dropped first (with its buffers and graph).

    A key must hold everything that a recording bakes in: shapes, call table, addresses, stream.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[Hashable, Recording] = OrderedDict()
        # Held while a recording is filled, run and read: its buffers are shared by all who use it.
        self.lock = threading.RLock()

    def get(self, key: Hashable, make: Callable[[], Recording]) -> Recording:
        """The recording of this key, made if it is new."""
        with self.lock:
            if key not in self._entries:
                with torch.inference_mode(False):  # the next call may be outside
                    self._entries[key] = make()
            self._entries.move_to_end(key)
            while len(self._entries) > self._limit:
                self._entries.popitem(last=False)
            return self._entries[key]

    def clear(self) -> None:
        with self.lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries
