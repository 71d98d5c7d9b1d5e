"""No backend answers by weights of before: every way of writing, every backend, every mode.

The yardstick is the same backend on fresh copies of the weights, bit for bit, and that the answer
moved at all. GPU backends run as everywhere here: Triton's interpreter with a stand-in for CUDA
graphs, CUDA sources in the emulator.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import recurx
from recurx import Schedule
from recurx.backends import cpu, weight_cache
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


# ---- ways of writing ----------------------------------------------------------------------------


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


# ---- backends and modes -------------------------------------------------------------------------


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
        linear.weight = nn.Parameter(
            old.weight.detach().clone(memory_format=torch.contiguous_format)
        )
    return answer(fresh, backend, mode)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def edited(weight: Tensor, picks: random.Random) -> Tensor:
    """Other values for a weight, in most cases but a few elements of it."""
    values = contiguous(weight)
    rows, columns = values.shape
    what = picks.randrange(4)
    if what == 0:  # one element, such that bf16 states show it
        values[picks.randrange(rows), picks.randrange(columns)] += picks.choice((-1, 1)) * 4
    elif what == 1:
        values[picks.randrange(rows)] *= -1.5
    elif what == 2:
        values[:, picks.randrange(columns)] += 0.75
    else:
        values = torch.randn(rows, columns) / columns**0.5
    return values


def edit_and_compare(backend: str, mode: str, ways, count: int, first: int = 0) -> None:
    """`count` edits by these ways in turn, beginning with the `first`-th."""
    picks, stack = random.Random(first), Stack()
    before, moved = answer(stack, backend, mode), 0
    for number in range(first, first + count):
        way, linear = ways[number % len(ways)], picks.choice(stack.linears())
        way(linear, edited(linear.weight, picks))
        now = answer(stack, backend, mode)
        assert same(now, of_copies(stack, backend, mode)), way.__name__
        moved += not same(now, before)
        before = now
    assert moved >= 0.8 * count, "the edits are large enough to be seen"


MODES = ("eval", "inference", "training")
# Of each mode; those of all modes together go through all ways.
COUNTS = {"eager": 26, "cpu": 150, "triton tiled": 5, "triton persistent": 7, "cuda owner": 5,
          "cuda grid": 5}  # fmt: skip
# All calls here are in the window, which is one for both kinds of plan.
TWICE = ("triton persistent", "training")
CASES = [(engine, mode) for engine in ENGINES for mode in MODES if (engine, mode) != TWICE]


@pytest.mark.parametrize("engine, mode", CASES)
def test_every_write_is_seen(engine: str, mode: str) -> None:
    count = COUNTS[engine]
    with ENGINES[engine]() as backend:
        edit_and_compare(backend, mode, WAYS, count, MODES.index(mode) * count)


def test_there_are_more_than_500_edits() -> None:
    counts = {name: 0 for name in ENGINES}
    for engine, _ in CASES:
        counts[engine] += COUNTS[engine]
    assert sum(counts.values()) >= 500 and min(counts.values()) >= len(WAYS)


# ---- planted: the rules of before fail -----------------------------------------------------------


def versions(weights: list[Tensor]) -> object:
    return [-1 if w.is_inference() else w._version for w in weights]


def sampled(weights: list[Tensor]) -> object:
    whole = [w.detach().flatten() for w in weights if w.is_contiguous()]
    return versions(weights), [w[:: w.numel() // 256 + 1].tolist() for w in whole]


@pytest.mark.parametrize("rule", [versions, sampled])
def test_the_rules_of_before_miss_edits(native, monkeypatch, rule) -> None:
    monkeypatch.setattr(native, "packed", weight_cache.WeightCache(16, rule))
    with pytest.raises(AssertionError, match="by_"):
        edit_and_compare("cpu", "eval", IN_PLACE, 100)


def test_a_version_counter_misses_edits_on_a_gpu(monkeypatch) -> None:
    with ENGINES["triton persistent"]() as backend:
        tapes = weight_cache.WeightCache(16, versions)
        monkeypatch.setattr(recurx.backends.get("triton"), "tapes", tapes)
        with pytest.raises(AssertionError, match="by_data"):
            edit_and_compare(backend, "eval", (by_data,), 2)


# ---- writers beside this process, and beside this thread -----------------------------------------

WRITER = """
import sys
import numpy as np
values = np.memmap(sys.argv[1], np.float32, "r+")
for line in sys.stdin:
    at, value = line.split()
    values[int(at)] = float(value)
    print("done", flush=True)
"""


def test_another_process_writes_to_shared_memory(native, tmp_path) -> None:
    stack, picks = Stack(), random.Random(0)
    linear = stack.layers[1].mlp.gate_up_proj
    path, count = tmp_path / "weight", linear.weight.numel()
    linear.weight.detach().numpy().tofile(path)
    shared = torch.from_file(str(path), shared=True, size=count).view_as(linear.weight)
    linear.weight = nn.Parameter(shared)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    before = answer(stack, "cpu", "eval")
    for _ in range(20):
        writer.stdin.write(f"{picks.randrange(count)} {picks.choice((-9, 9))}\n")
        writer.stdin.flush()
        assert writer.stdout.readline() == "done\n"
        now = answer(stack, "cpu", "eval")
        assert not same(now, before) and same(now, of_copies(stack, "cpu", "eval"))
        before = now
    writer.stdin.close()
    assert writer.wait() == 0


def test_a_write_while_packing_only_makes_it_pack_again(native, monkeypatch) -> None:
    """And what was packed of half of each is never taken for either, when the old values return."""
    stack = Stack()
    weight = stack.linears()[0].weight
    old, pack, packed = weight.detach().clone(), cpu._pack, []

    def racing(*arguments):
        packed.append(1)
        if len(packed) == 1:
            weight.data.mul_(2)  # after the hash, before the values are read
        return pack(*arguments)

    native.packed.clear()
    monkeypatch.setattr(cpu, "_pack", racing)
    answer(stack, "cpu", "eval")
    doubled = answer(stack, "cpu", "eval")
    assert len(packed) == 2 and same(doubled, answer(stack, "cpu", "eval")) and len(packed) == 2
    monkeypatch.setattr(cpu, "_pack", pack)
    assert same(doubled, of_copies(stack, "cpu", "eval"))
    monkeypatch.setattr(cpu, "_pack", racing)
    native.packed.clear()
    packed.clear()
    weight.data.copy_(old)
    answer(stack, "cpu", "eval")  # the race again
    weight.data.copy_(old)
    assert same(answer(stack, "cpu", "eval"), of_copies(stack, "cpu", "eval"))


# ---- what is packed how often --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiled", "persistent"])
def test_training_rounds_for_each_forward_and_for_the_backward(kind: str, monkeypatch) -> None:
    from recurx.packed import PackedNets

    fills, fill = [], PackedNets.fill
    monkeypatch.setattr(PackedNets, "fill", lambda s, weights: fills.append(1) or fill(s, weights))
    with ENGINES[f"triton {kind}"]() as backend:
        answer(Stack(), backend, "training")
        assert len(fills) == 2, "the window, which is all calls here, and its backward"
        answer(stack := Stack(), backend, "eval")
        answer(stack, backend, "eval")
        assert len(fills) == 4
        with weight_cache.frozen_weights():
            answer(stack, backend, "eval")
            answer(stack, backend, "eval")
        assert len(fills) == 5


@pytest.mark.parametrize("engine", ["cpu", "triton persistent"])
def test_a_freeze_holds_for_its_memory_alone(engine: str) -> None:
    """Weights that lie where frozen ones lay are looked at, and no other thread is bound by it."""
    with ENGINES[engine]() as backend, weight_cache.frozen_weights():
        stack = Stack()
        before = answer(stack, backend, "eval")
        stack.linears()[0].weight.data.mul_(2)  # against the promise, and so not seen
        assert same(answer(stack, backend, "eval"), before)
        with ThreadPoolExecutor(1) as pool:
            elsewhere = pool.submit(answer, stack, backend, "eval").result()
        assert same(elsewhere, of_copies(stack, backend, "eval"))
        for seed in range(1, 4):
            values = [linear.weight.detach() for linear in Stack(seed).linears()]
            for linear, new in zip(stack.linears(), values, strict=True):
                linear.weight = None
                linear.weight = nn.Parameter(new.clone())
            assert same(answer(stack, backend, "eval"), of_copies(stack, backend, "eval"))


def test_solve_hashes_once_and_sees_what_was_written_before_it(native, monkeypatch) -> None:
    from recurx.models import TRM, TRMConfig

    sizes = dict(hidden_size=64, num_heads=2, inner_multiple=32)
    model = TRM(TRMConfig.tiny(7, 13, **sizes), "cpu").eval()
    batch = {"inputs": torch.randint(0, 7, (2, 13))}
    asked, digest = [], native.packed._digest
    monkeypatch.setattr(native.packed, "_digest", lambda w: asked.append(1) or digest(w))

    def solved() -> Tensor:
        return recurx.solve(model, batch, max_steps=3, halt=None, logits=True).logits

    first = solved()
    assert len(asked) == 2, "before and after packing"
    assert torch.equal(solved(), first) and len(asked) == 3
    model.inner.L_level.layers[0].mlp.down_proj.weight.data.mul_(3)
    changed = solved()
    assert not torch.equal(changed, first)
    model.inner.backend = "eager"
    torch.testing.assert_close(solved(), changed, rtol=1e-3, atol=1e-3)


# ---- tensors that weak references and inference mode would spoil ---------------------------------


@pytest.mark.parametrize("engine, mode", CASES)
def test_parameters_can_be_swapped_after_any_call(engine: str, mode: str) -> None:
    """Weak references on parameters forbid `.double()` under the flag for swapping."""
    with ENGINES[engine]() as backend:
        stack = Stack()
        answer(stack, backend, mode)
        stack.requires_grad_(True)
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            stack.double()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)
        assert all(weight.dtype == torch.float64 for weight in stack.parameters())
        assert same(answer(stack, backend, "eval"), of_copies(stack, backend, "eval"))


@pytest.mark.parametrize("engine", ENGINES)
def test_what_inference_mode_cached_serves_ordinary_calls(engine: str) -> None:
    with ENGINES[engine]() as backend:
        stack = Stack()
        first = answer(stack, backend, "inference")
        assert same(answer(stack, backend, "inference"), first)
        assert same(answer(stack, backend, "eval"), first)
        by_pointer(stack.linears()[3], torch.randn(64, 32))
        after = answer(stack, backend, "training")
        assert not same(after[:1], first[:1])
        assert same(answer(stack, backend, "eval"), of_copies(stack, backend, "inference"))


def test_quantised_weights_can_be_swapped() -> None:
    from recurx import fp8

    weight = nn.Parameter(torch.randn(8, 8))
    codes = fp8.quantize_weight(weight)
    weight.data.copy_(codes.dequantized())
    fp8.register(weight, codes)
    other = nn.Parameter(torch.randn(8, 8))
    torch.utils.swap_tensors(weight, other)
    assert not fp8.are_quantized([weight]) and fp8.are_quantized([other])


@pytest.mark.parametrize("backend", ["eager", "cpu", "auto"])
def test_a_patched_model_is_right_after_conversions_that_swap(native, backend: str) -> None:
    from tests import lookalike

    patched, plain = lookalike.build(), lookalike.build()
    recurx.patch(patched, backend=backend)

    def logits(model: nn.Module) -> Tensor:
        carry, batch = lookalike.inputs(model)
        inner = next(m for m in model.modules() if isinstance(m, lookalike.Inner))
        with torch.no_grad():
            return inner(carry, batch)[1]

    torch.testing.assert_close(logits(patched), logits(plain), rtol=1e-4, atol=1e-4)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for model in (patched, plain):
            model.double().to(torch.bfloat16).float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    torch.testing.assert_close(logits(patched), logits(plain), rtol=1e-4, atol=1e-4)
