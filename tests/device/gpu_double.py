"""A GPU that is not there: importing this makes CPU tensors say that they are on a CUDA device.

For processes of their own: what it changes, it changes for good. Code of the host runs as on a GPU,
down to the launch: plans, packing, arguments. A launch is counted and computes nothing; what the
backends give instead is the reference. Libraries of kernels are the emulator's builds of the same
sources. So a wrong number of arguments, a name that is gone or a phase that selects nothing shows
here; what only hardware can answer is listed by `test_over_a_double.py`.

The sizes are small, those of the tests (`device_sizes.py`) and of bench/gpu_check alike.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import os
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ["RECURX_DEVICE_SIZES"] = "small"
os.environ["RECURX_GPU_CHECK_SIZES"] = str(Path(__file__).with_name("small_sizes.json"))
os.environ["PYTEST_PLUGINS"] = "gpu_double"  # for the hooks below

import torch
from torch.utils import _device as default_device

import recurx
from bench.gpu_check import journal
from recurx import backends, measure, reference, reference_backward, small_ops
from recurx.backends import Window, cuda, graphs, triton
from recurx.backends.cuda_abi import RxRecursion
from recurx.bench import ceilings
from recurx.bench.profiler import ceilings as roofs
from recurx.plan import DEVICES
from recurx.plan import device as devices
from recurx.train import CudaGraphs

NAME = "SYNTHETIC (a double of a GPU, no hardware)"
DEVICE = dataclasses.replace(DEVICES["h100"], units=4)
launches: list[str] = []  # what was launched, in order
GPU = torch.device("cuda", 0)


# ---- tensors -------------------------------------------------------------------------------------


def _is_gpu(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.partition(":")[0] == "cuda"


def _on_host(make: Any) -> Any:
    """A function that makes tensors, here instead of on the GPU."""

    @functools.wraps(make)
    def made(*given: Any, **named: Any) -> Any:
        given = tuple("cpu" if _is_gpu(value) else value for value in given)
        named = {key: "cpu" if _is_gpu(value) else value for key, value in named.items()}
        named.pop("pin_memory", None)
        found = make(*given, **named)
        return found.zero_() if "empty" in make.__name__ else found

    return made


FACTORIES = (
    "empty", "empty_like", "empty_strided", "zeros", "zeros_like", "ones", "ones_like", "full",
    "full_like", "tensor", "as_tensor", "arange", "linspace", "eye", "rand", "rand_like", "randn",
    "randn_like", "randint", "randint_like", "randperm",
)  # fmt: skip
METHODS = ("to", "new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")


class Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, "cpu")


def _install_tensors() -> None:
    for owner, names in ((torch, FACTORIES), (torch.Tensor, METHODS)):
        for name in names:
            setattr(owner, name, _on_host(getattr(owner, name)))
    torch.Tensor.device = property(lambda tensor: GPU)
    torch.Tensor.is_cuda = property(lambda tensor: True)
    torch.Tensor.cuda = torch.Tensor.cpu = lambda tensor, *_, **__: tensor.clone()
    torch.Tensor.pin_memory = lambda tensor, *_: tensor
    torch.Generator = Generator
    default_device._device_constructors = lambda: frozenset()  # of `with torch.device(...)`


# ---- torch.cuda ----------------------------------------------------------------------------------


class Stream:
    cuda_stream = 0

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    wait_event = synchronize = record_event = wait_stream

    def query(self) -> bool:
        return False


class Event:
    def __init__(self, **named: Any) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at) + 1e-6

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class Graph:
    """Its body has run; a replay does nothing more."""

    def replay(self) -> None:
        launches.append("replay")

    def register_generator_state(self, generator: Any) -> None:
        pass


capturing = False


@contextlib.contextmanager
def graph(graph: Any, **named: Any) -> Any:
    global capturing
    capturing = True
    try:
        yield
    finally:
        capturing = False


PROPERTIES = SimpleNamespace(
    name=NAME, major=9, minor=0, multi_processor_count=DEVICE.units, total_memory=1 << 33,
    L2_cache_size=50 << 20, shared_memory_per_block_optin=DEVICE.shared_bytes, warp_size=32,
    gcnArchName="", max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
)  # fmt: skip


def nothing() -> Any:
    """A function of its own each: Dynamo tells functions of torch from each other."""
    return lambda *_, **__: None


def nowhere() -> Any:
    return lambda *_, **__: contextlib.nullcontext()


TORCH_CUDA = {
    "is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: 1,
    "current_device": lambda: 0, "get_device_capability": lambda device=None: (9, 0),
    "get_device_name": lambda device=None: NAME,
    "get_device_properties": lambda device=None: PROPERTIES,
    "current_stream": lambda device=None: Stream(), "default_stream": lambda device=None: Stream(),
    "is_current_stream_capturing": lambda: capturing, "is_bf16_supported": lambda **_: True,
    "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": graph,
    "stream": nowhere(), "device": nowhere(), "device_of": nowhere(),
    "synchronize": nothing(), "empty_cache": nothing(), "set_device": nothing(),
    "_sleep": nothing(),
    "set_sync_debug_mode": nothing(), "reset_peak_memory_stats": nothing(),
    "memory_allocated": lambda device=None: 0, "max_memory_allocated": lambda device=None: 0,
    "memory_reserved": lambda device=None: 0,
    "mem_get_info": lambda device=None: (1 << 33, 1 << 33),
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
}  # fmt: skip


# ---- the backends --------------------------------------------------------------------------------


class Library:
    """In the place of recurx._C: every size is 256 bytes, every launch succeeds."""

    kinds = ("owner", "grid", "cluster")
    has_timeline = False

    def call(self, name: str, *arguments: Any) -> None:
        launches.append(name)
        if isinstance(arguments[0], RxRecursion) and arguments[0].scratch_bytes == 1 << 40:
            raise recurx.errors.CudaError("owner_sm80: cudaErrorInvalidValue")

    def bytes_of(self, name: str, *arguments: Any) -> int:
        return 256


def _computed(problem: Any, operands: Any, span: Any) -> list[torch.Tensor]:
    carry = dict(zip(problem.schedule.states, operands.states, strict=True))
    nets = problem.bind(operands.weights)
    with torch.no_grad():
        out = reference.run(problem.schedule, nets, operands.x, carry, operands.rope, *span)
    return list(out.values())


def _right(engine: type) -> None:
    """The backend launches, then its results become those of the reference."""
    run = engine.run

    def launched(self: Any, problem: Any, operands: Any, span: Any) -> list[torch.Tensor]:
        outs = run(self, problem, operands, span)
        found = _computed(problem, operands, span)
        assert [out.shape for out in outs] == [state.shape for state in found]
        return found

    engine.run = launched


class RightWindow(Window):
    def __init__(self, real: Window) -> None:
        self.real, self.own_forward = real, real.own_forward

    def kept(self, *arguments: Any) -> Any:
        return self.real.kept(*arguments)

    def forward(self, problem: Any, operands: Any, span: Any, save: Any) -> Any:
        outs, kept = self.real.forward(problem, operands, span, save)
        found = _computed(problem, operands, span)
        assert [out.shape for out in outs] == [state.shape for state in found]
        return found, kept

    def backward(self, problem, operands, span, save, outs, kept, d_outs, wants):  # type: ignore[no-untyped-def]
        given = (problem, operands, span, save, outs, kept, d_outs, wants)
        shapes = [None if grad is None else grad.shape for grad in self.real.backward(*given)]
        flat = [torch.zeros_like(operands.x) if d is None else d for d in d_outs]
        grads = reference_backward.run(problem, operands, span, flat)
        found = [grad if want else None for grad, want in zip(grads, wants, strict=True)]
        assert shapes == [None if grad is None else grad.shape for grad in found]
        return found


def _install_backends() -> None:
    cuda.Cuda.library = lambda self: Library()
    module = ModuleType("double")  # knows nothing of a driver
    cuda._compiled_module = lambda: module
    _right(cuda.Cuda)
    _right(triton.Triton)
    window = triton.Triton.window
    triton.Triton.window = lambda self, problem: (
        (real := window(self, problem)) and RightWindow(real)  # none of kind "persistent"
    )
    devices._cuda = lambda index: DEVICE
    graphs.cuda_capture = triton.cuda_capture = lambda launch: launch
    CudaGraphs.capture = lambda self, run: run
    with contextlib.suppress(ImportError):
        from triton.runtime.jit import JITFunction

        JITFunction.run = lambda kernel, *_, **__: launches.append(kernel.__name__)
    if os.environ.get(journal.PHASE, "").startswith("times"):  # whose results are judged
        small_ops.on_triton = lambda tensor: False
    backends.changed()


# ---- libraries of kernels, and sizes -------------------------------------------------------------


def library(sources: Any, arch: str) -> ctypes.CDLL:
    """The emulator's build of the sources."""
    from emulator.build import Emulated, build

    emulated = Emulated(build(list(sources), False), False)
    emulated.library.emulated = emulated
    launches.append(f"library {sources[0].name}")
    return emulated.library


def _install_libraries() -> None:
    import nvcc_library

    nvcc_library.library = library
    ceilings.ceilings_of = lambda *_: {
        "copy_gbs": 1.0, "large_bf16_tflops": 1.0, "case_bf16_tflops": 1.0,
        "large_fp32_tflops": 1.0, "case_fp32_tflops": 1.0,
    }  # fmt: skip
    measure.COPY_BYTES["cuda"] = roofs.SMALLER_COPY = 1 << 16
    measure.LARGE["cuda"] = roofs.SMALLER_SIDE = 32


def install() -> None:
    _install_tensors()
    for name, value in TORCH_CUDA.items():
        setattr(torch.cuda, name, value)
    torch.compile = lambda model=None, **_: model if model is not None else (lambda m: m)
    torch.cuda.profiler.start = torch.cuda.profiler.stop = nothing()
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = nothing()
    profile, only_cpu = torch.profiler.profile, [torch.profiler.ProfilerActivity.CPU]
    torch.profiler.profile = lambda activities=None, **named: profile(activities=only_cpu, **named)
    _install_backends()
    _install_libraries()
    hang = os.environ.get("RECURX_DOUBLE_HANGS", "")
    if hang and os.environ.get("RECURX_GPU_CHECK_PHASE", "").startswith(hang):
        wait_for_the_device()


def wait_for_the_device() -> None:
    """As a kernel that never ends: signals meet C code that keeps the interpreter's lock."""
    pause = ctypes.PyDLL(None).usleep
    with contextlib.suppress(KeyboardInterrupt):  # who reads the line may send one at once
        journal.emit("hangs", pid=os.getpid())
        pause(999_999)
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            pause(999_999)


def pytest_runtest_setup(item: Any) -> None:
    launches.clear()


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" and report.outcome != "passed":
        name = report.nodeid.rsplit("/", 1)[-1]
        journal.emit("launched", test=name, launches=len(launches))


install()
