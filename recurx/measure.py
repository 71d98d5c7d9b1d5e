"""What a machine reaches: the fastest of several timings of copies, products and small operators.

`recurx.plan` describes this CPU by these figures, `recurx.profile` measures its roofline by these
functions and the benchmark suite writes the figures beside its rows. This module lies below all
three: it knows PyTorch, the reference and the compiled engine.
"""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from recurx import reference
from recurx.nets import ATTENTION, BlockSpec, numbers_of

SECONDS = 0.15  # for each large copy and product
COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}  # beyond every cache
LARGE = {"cpu": 1024, "cuda": 8192}  # side of the square product: about a peak
STREAM_BYTES = 14 << 20  # the weights of a TRM in bf16; more than a core's own cache
# Operators of one attention block of `recurx.reference` in fp32, by which their time is measured.
BLOCK_OPERATORS = 30
BARRIERS = 5  # of a block in the engine: after qkv, attention, o, gate-up and down


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, so that a clock shows its work and not its launches."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run."""
    synchronize(device)
    begin = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begin


def best_seconds(
    run: Callable[[], object],
    device: torch.device | str = "cpu",
    repeats: int = 1,
    seconds: float = 0.0,
) -> float:
    """Shortest of several timings: a ceiling is what the machine can do undisturbed.

    After one run to warm up come at least `repeats`, and more until `seconds` are over.
    """
    device = torch.device(device)
    best = float("inf")
    with torch.no_grad():
        run()
        until = time.perf_counter() + seconds
        while repeats > 0 or time.perf_counter() < until:
            best, repeats = min(best, seconds_of(run, device)), repeats - 1
    return max(best, 1e-9)


def copy_gbs(device: torch.device | str, nbytes: int | None = None) -> float:
    """GB/s of a copy of `nbytes` (None for `COPY_BYTES`), bytes read plus bytes written."""
    device = torch.device(device)
    source = torch.ones((nbytes or COPY_BYTES[device.type]) // 4, device=device)
    target = torch.empty_like(source)
    seconds = best_seconds(lambda: target.copy_(source), device, seconds=SECONDS)
    return 2e-9 * source.nbytes / seconds


def product_tflops(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device | str) -> float:
    """TFLOP/s of [m, k] @ [k, n] with real data: zeros run faster on matrix units.

    The second operand is a transposed weight, as in models: CPUs take slow paths in bf16 without.
    """
    a, b = _random(m, k).to(device, dtype), _random(n, k).to(device, dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)
    seconds = best_seconds(lambda: torch.mm(a, b.T, out=out), device, seconds=SECONDS)
    return 2e-12 * m * k * n / seconds


def _random(*shape: int) -> Tensor:
    """The same values at every call, and the caller's random state left alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), device="cpu")


def engine_isa() -> str:
    """The instruction set that the CPU engine takes here; "" if there is no engine."""
    try:
        from recurx import _C

        return str(_C.cpu_isa())
    except (ImportError, AttributeError, RuntimeError):
        return ""


def cluster_places(index: int) -> tuple[tuple[int, int, int], ...]:
    """(D, CTAs of a cluster, clusters that run at once) of each cluster kernel on a GPU."""
    try:
        from recurx import _C

        with torch.cuda.device(index):
            return tuple(_C.cuda_cluster_places())
    except (ImportError, AttributeError):
        return ()


def processor() -> tuple[str, list[str]]:
    """Its model and feature flags as Linux lists them; no flags elsewhere."""
    fields = {}
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    model = fields.get("model name") or platform.processor() or platform.machine()
    return model, fields.get("flags", "").split()


def last_cache_bytes() -> int:
    """Size of the CPU's last cache as Linux tells it, else 0."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text().strip()
            sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes, default=0)


def stream_gbs() -> float:
    """GB/s of reading values that lie in the last cache and in no nearer one, by all threads."""
    values = torch.ones(STREAM_BYTES // 4)
    return 1e-9 * STREAM_BYTES / best_seconds(values.sum, repeats=20)


def operator_us() -> float:
    """Microseconds of one small PyTorch operator in a model: a tiny block of the reference."""
    spec = BlockSpec(ATTENTION, 32, 32, num_heads=2)
    weights = [torch.zeros(shape) for shape in spec.weight_shapes]
    h, tables = torch.ones(1, 4, 32), (torch.ones(4, 16), torch.zeros(4, 16))
    seconds = best_seconds(lambda: reference.block(h, spec, weights, tables), repeats=20)
    return 1e6 * seconds / BLOCK_OPERATORS


def split_us() -> float:
    """Microseconds that a PyTorch operator of a small model loses by being split over all threads;
    0 without a second one."""
    if torch.get_num_threads() == 1:
        return 0.0
    spec = BlockSpec(ATTENTION, 64, 192, num_heads=4)
    weights = [torch.zeros(shape) for shape in spec.weight_shapes]
    h = torch.ones(64, 17, 64)
    return 1e6 * _lost(lambda: reference.block(h, spec, weights, None)) / BLOCK_OPERATORS


def barrier_us() -> float:
    """Microseconds that a stage of the engine loses by being split over all threads; 0 without an
    engine or a second thread."""
    isa = engine_isa()
    if torch.get_num_threads() == 1 or not isa:
        return 0.0
    from recurx import _C

    calls, tokens, width = 4, 97, 512
    spec = BlockSpec(ATTENTION, width, width, num_heads=8)
    weights = [_random(*shape) / width for shape in spec.weight_shapes]
    pointers = [(weight.data_ptr(), False) for weight in weights]
    net = _C.cpu_pack([numbers_of(spec)], pointers, False, isa)
    state = torch.ones(1, tokens, width)
    out = torch.empty_like(state)

    # Every call writes state 1 from itself and from x, which is state 0; no sum is shared.
    program = _C.Program([(0, 1, [1], [0], 0)] * calls)

    def run() -> None:
        _C.cpu_run([net], program, (1, tokens, width), [state.data_ptr()] * 2,
                   [0, out.data_ptr()], 0, 0, torch.get_num_threads())  # fmt: skip

    return 1e6 * _lost(run) / (calls * BARRIERS)


def _lost(run: Callable[[], object]) -> float:
    """Seconds on all threads beyond one thread's share of what it takes alone; never 0."""
    threads = torch.get_num_threads()
    together = best_seconds(run, repeats=10)
    try:
        torch.set_num_threads(1)
        alone = best_seconds(run, repeats=10)
    finally:
        torch.set_num_threads(threads)
    return max(together - alone / threads, 1e-9)
