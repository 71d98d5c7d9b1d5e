"""A small net, ways of writing to its weights, and every backend that answers by them.

The yardstick is the same backend on fresh copies of the weights, bit for bit. GPU backends run as
everywhere here: Triton's interpreter with a stand-in for CUDA graphs, CUDA sources in the emulator.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import recurx
from recurx import Schedule
from recurx.backends import cpu
from tests.factories import make_inputs, make_net, rope

SCHEDULE = Schedule.trm(1, 1)
SHAPE = dict(tokens=5, hidden=64)


class Layer(nn.Module):
    """A block under the official attribute names."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        qkv, o, gate_up, down = (nn.Linear(*w.shape[::-1], bias=False) for w in weights)
        self.self_attn, self.mlp, self.norm_eps = nn.Module(), nn.Module(), 1e-5
        self.self_attn.qkv_proj, self.self_attn.o_proj = qkv, o
        self.self_attn.num_heads = self.self_attn.num_key_value_heads = 2
        self.self_attn.causal = False
        self.mlp.gate_up_proj, self.mlp.down_proj = gate_up, down
        for linear, weight in zip((qkv, o, gate_up, down), weights, strict=True):
            linear.weight = nn.Parameter(weight.clone())


class Stack(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        net = make_net(blocks=2, inner=32, seed=seed, **SHAPE)
        self.layers = nn.ModuleList(Layer(list(w)) for _, w in net.spec.by_block(net.weights))

    def linears(self) -> list[nn.Linear]:
        return [module for module in self.modules() if isinstance(module, nn.Linear)]


def by_copy(linear: nn.Linear, values: Tensor) -> None:
    with torch.no_grad():
        linear.weight.copy_(values)


def by_data(linear: nn.Linear, values: Tensor) -> None:
    linear.weight.data.copy_(values)


def by_numpy(linear: nn.Linear, values: Tensor) -> None:
    linear.weight.detach().numpy()[...] = values.numpy()


def by_pointer(linear: nn.Linear, values: Tensor) -> None:
    values = values.contiguous()
    ctypes.memmove(linear.weight.data_ptr(), values.data_ptr(), values.nbytes)


def by_storage(linear: nn.Linear, values: Tensor) -> None:
    linear.weight.untyped_storage().copy_(values.contiguous().untyped_storage())


def by_inference(linear: nn.Linear, values: Tensor) -> None:
    with torch.inference_mode():
        linear.weight.copy_(values)


def by_new_data(linear: nn.Linear, values: Tensor) -> None:
    linear.weight.data = values.clone()


def by_new_parameter(linear: nn.Linear, values: Tensor) -> None:
    linear.weight = None  # its memory may be that of the next one
    linear.weight = nn.Parameter(values.clone())


def by_assign(linear: nn.Linear, values: Tensor) -> None:
    linear.load_state_dict({"weight": values.clone()}, assign=True)


def by_swap(linear: nn.Linear, values: Tensor) -> None:
    torch.utils.swap_tensors(linear.weight, nn.Parameter(values.clone()))


def by_strides(linear: nn.Linear, values: Tensor) -> None:
    linear.weight.data = values.t().contiguous().t()


def by_freed_storage(linear: nn.Linear, values: Tensor) -> None:
    """As FSDP gathers: the same storage, its memory freed and given back."""
    if not linear.weight.untyped_storage().resizable():  # numpy has a view of it
        linear.weight.data = values.clone()
    storage = linear.weight.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    linear.weight.data.copy_(values)


def by_optimizer(linear: nn.Linear, values: Tensor) -> None:
    weight = linear.weight
    weight.grad = (weight.detach() - values).clone()
    torch.optim.SGD([weight], lr=1.0).step()
    weight.grad = None


IN_PLACE = (by_copy, by_data, by_numpy, by_pointer, by_storage, by_inference, by_optimizer)
WAYS = (
    *IN_PLACE, by_new_data, by_new_parameter, by_assign, by_swap, by_strides, by_freed_storage,
)  # fmt: skip


@contextlib.contextmanager
def eager() -> Iterator[str]:
    yield "eager"


@contextlib.contextmanager
def compiled() -> Iterator[str]:
    reason = cpu.BACKEND.why_unavailable()
    if reason is not None:
        pytest.skip(f"backend cpu {reason}")
    yield "cpu"


def interpreted(kind: str) -> Callable[[], contextlib.AbstractContextManager[str]]:
    @contextlib.contextmanager
    def inside() -> Iterator[str]:
        pytest.importorskip("triton", reason="triton has no wheel for this platform")
        from simulate import FakeGraphs, triton_on_cpu

        with triton_on_cpu(kind, capture=FakeGraphs()):
            yield "triton"

    return inside


def emulated(family: str) -> Callable[[], contextlib.AbstractContextManager[str]]:
    @contextlib.contextmanager
    def inside() -> Iterator[str]:
        from dataclasses import replace

        from emulator.build import unavailable
        from emulator.grid import FILES, load_kernels
        from emulator.owner import emulate, installed
        from recurx.backends.cuda import Cuda
        from recurx.plan import DEVICES

        reason = unavailable()
        if reason is not None:
            pytest.skip(reason)
        if family == "owner":
            cuda = emulate(((64, 2),))
        else:
            library = load_kernels(FILES, checked=False).library
            cuda = Cuda(library, replace(DEVICES["a100"], units=3))
        with installed(cuda):
            yield "cuda"

    return inside


ENGINES = {
    "eager": eager,
    "cpu": compiled,
    "triton tiled": interpreted("tiled"),
    "triton persistent": interpreted("persistent"),
    "cuda owner": emulated("owner"),
    "cuda grid": emulated("grid"),
}


def answer(stack: Stack, backend: str, mode: str) -> list[Tensor]:
    """The states after one recursion, and in training the gradients of the weights."""
    x, carry = make_inputs(SCHEDULE, batch=1, dtype=torch.bfloat16, **SHAPE)
    call = dict(backend=backend, cos_sin=rope(**SHAPE))
    if mode == "training":
        weights = [linear.weight.requires_grad_() for linear in stack.linears()]
        with torch.enable_grad():
            out = recurx.recurse(SCHEDULE, {"L": stack}, x, carry, **call)["z_H"]
            grads = torch.autograd.grad(out.float().square().sum(), weights)
        return [out.detach(), *grads]
    with torch.inference_mode() if mode == "inference" else torch.no_grad():
        out = recurx.recurse(SCHEDULE, {"L": stack}, x, carry, **call)
    return [state.clone() for state in out.values()]


def contiguous(weight: Tensor) -> Tensor:
    return weight.detach().clone(memory_format=torch.contiguous_format)


def of_copies(stack: Stack, backend: str, mode: str) -> list[Tensor]:
    fresh = Stack()
    for linear, old in zip(fresh.linears(), stack.linears(), strict=True):
        linear.weight = nn.Parameter(contiguous(old.weight))
    return answer(fresh, backend, mode)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


MODES = ("eval", "inference", "training")


# All calls here are in the window, which is one for both kinds of plan.
TWICE = ("triton persistent", "training")
CASES = [(engine, mode) for engine in ENGINES for mode in MODES if (engine, mode) != TWICE]
