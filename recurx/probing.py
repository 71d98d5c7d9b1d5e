"""The probe of a proof: a stack's own forward beside the reference, on random data and weights.

In training and in evaluation, with gradients; each layer alone too, because inside the stack a norm
hides how large its input was. It may draw no random numbers and change nothing. Code that passed
once is known by its signature, so that a second model of the same code is not probed.
"""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from recurx import reference
from recurx.nets import (
    ATTENTION,
    Net,
    NetSpec,
    layers_of,
    read_stack,
    respelled,
    rope_tables,
    spelled,
)
from recurx.operands import CosSin
from recurx.own_code import call_layer, call_own, style_of
from recurx.readings import Reading

# Scales of the samples of a probe: a state's and a sum's, one where activations saturate; for each
# layer alone also two so small that a norm shows its eps, the first of a block and the second.
SCALES = (0.3, 1.0, 6.0, 1e-3, 1e-5)
TOKENS = (6, 17)  # of attention: with gradient, and without; an even number and an odd one
# Relative, of each sample. The same operations in the same order give the same bits; a softmax
# written out differs by 3.4e-6 in fp32 and by 0.06 in bf16, in gradients, which counts only where
# fp32 cannot run. An activation silu(1.02 x) / 1.02 differs by 1e-2.
ALLOWED = {torch.float32: 3e-5, torch.bfloat16: 0.1}
MOST_KNOWN = 256
# Training, gradient, and by how much counters of calls are put ahead.
_MODES = ((True, True, 0), (False, True, 0), (False, False, 0), (False, False, 10**6))


Changes = dict[str, Any]  # fields of blocks that no name tells

_known: dict[Any, tuple[str | Changes, Any]] = {}  # by signature: what the probe said


def probed(module: Any, spec: NetSpec, reading: Reading, rope: bool) -> str | Changes:
    """What differs in this code; or in which fields it is not the blocks that its names tell."""
    device = read_stack(module).weights[0].device
    key = reading.signature, spec, rope, device.type
    if key not in _known:
        if style_of(module) is None:
            return "its forward takes other arguments than (hidden_states, input_injection, ...)"
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "it cannot be proved while a CUDA graph is captured; call it once before"
        with aside(device):
            difference = _differences(module, {}, rope, device) or {}
            if isinstance(difference, str):
                fits = (c for c in _candidates(module, rope, device)
                        if _differences(module, c, rope, device) is None)  # fmt: skip
                difference = next(fits, difference)
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        _known[key] = difference, reading.kept
    return _known[key][0]


def _candidates(module: Any, rope: bool, device: torch.device) -> list[Changes]:
    """Other spellings of the same weights that give the output of one run in fp32."""
    found, generator = [], torch.Generator().manual_seed(0)
    with contextlib.suppress(Exception):  # what fails here fails in `_differences`, which says how
        own, net = _fresh_copy(module, generator, device, torch.float32)
        tokens, tables = _tokens_and_tables(net.spec, rope, True, device)
        h = _random(net, SCALES[:3], tokens)[0]
        with torch.no_grad():
            got = call_own(own.eval(), h, None, tables)
            for changes in respelled(net.spec):
                other = Net.trusted(spelled(net.spec, changes), net.weights)
                if off("it", got, reference.call(h, other, tables)) is None:
                    found.append(changes)
    return found


def _differences(module: Any, changes: Changes, rope: bool, device: torch.device) -> str | None:
    generator = torch.Generator().manual_seed(0)
    own_dtypes = {weight.dtype for weight in read_stack(module).weights}
    mixed = [None] if len(own_dtypes) > 1 else []  # as they are: a convolution in bf16, say
    for dtype in (*mixed, torch.float32, torch.bfloat16):
        try:
            own, net = _fresh_copy(module, generator, device, dtype)
            net.spec = spelled(net.spec, changes)
        except Exception as error:  # foreign attributes may refuse to be copied
            return f"it cannot be copied for a probe: {type(error).__name__}: {error}"
        try:
            before, numbers = Reading(own).signature, _numbers(own)
            wanted: dict[bool, list[Tensor]] = {}
            for training, grad, count in _MODES:
                if count:  # numbers that calls change are put far ahead: nothing may hang on them
                    counters = [n for n, value in _numbers(own).items() if value != numbers[n]]
                    for part, name in counters:
                        vars(part)[name] = numbers[part, name]
                    if Reading(own).signature != before:
                        return "its forward changes its attributes"
                    if not counters:
                        break
                    for part, name in counters:
                        vars(part)[name] += count
                for child in _modules(own):
                    child.training = training
                difference = _stack_differs(own, net, rope, grad, wanted)
                if not grad and difference is None:
                    difference = _layers_differ(own, net, rope)
                if difference is not None:
                    mode = "training" if training else "evaluation"
                    return f"{difference} in {mode} mode"
            if dtype is not None:
                return None
        except Exception as error:  # anything may be wrong with code that we do not know
            failed = f"its forward fails in a probe with {type(error).__name__}: {error}"
    return failed  # flash-attn, say, takes no fp32: then bf16 speaks for it


def _stack_differs(
    own: Any, net: Net, rope: bool, grad: bool, wanted: dict[bool, list[Tensor]]
) -> str | None:
    """One run of the whole stack; without gradient also without an injection."""
    tokens, tables = _tokens_and_tables(net.spec, rope, grad, net.weights[0].device)
    h, injected, weight = _random(net, SCALES[:3], tokens)
    leaves = [h.requires_grad_(), injected.requires_grad_(), *map(_leaf, net.weights)]

    def run(call: Callable[[], Tensor]) -> list[Tensor]:
        with torch.set_grad_enabled(grad):
            out = call()
        if not grad:
            return [out]
        return [out, *torch.autograd.grad((out * weight).sum(), leaves, materialize_grads=True)]

    drawn = random_state(h.device)
    got = run(lambda: call_own(own, h, injected if grad else None, tables))
    if random_state(h.device) != drawn:
        return "it draws random numbers"
    if grad not in wanted:
        wanted[grad] = run(lambda: reference.call(h + injected if grad else h, net, tables))
    names = ["its output", *["its gradient of the input"] * 2]
    names += [f"its gradient of weight {number}" for number in range(len(net.weights))]
    return next(filter(None, map(off, names, got, wanted[grad])), None)


def _layers_differ(own: Any, net: Net, rope: bool) -> str | None:
    """Each layer alone: inside the stack a norm hides how large its input was."""
    tokens, tables = _tokens_and_tables(net.spec, rope, False, net.weights[0].device)
    blocks = net.spec.by_block(net.weights)
    for number, (layer, (block, weights)) in enumerate(zip(layers_of(own), blocks, strict=True)):
        if type(layer).forward is nn.Module.forward:
            continue  # the stack's own code does its work
        h = _random(net, SCALES, tokens)[0]
        with torch.no_grad():
            want = reference.block(h, block, weights, tables)
            got = call_layer(layer, h, tables)
        said = off(f"`layers.{number}`: its output", got, want)
        if said is not None:
            return said
    return None


def off(name: str, got: Tensor, want: Tensor, floor: float = 1e-30) -> str | None:
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{name} is {got.dtype} {list(got.shape)}"
    with torch.no_grad():
        flat, wrong = (t.float().flatten(1 if t.ndim == 3 else 0) for t in (want, want - got))
    error = (wrong.norm(dim=-1) / flat.norm(dim=-1).clamp_min(floor)).max().item()
    if error <= ALLOWED[want.dtype]:
        return None
    return f"{name} is off by {error:.2g} from the blocks that its names and weights tell"


def _random(net: Net, scales: tuple[float, ...], tokens: int) -> list[Tensor]:
    """Three tensors [B, T, D], a scale each sample; the same ones each time."""
    if net.spec.blocks[0].tokens:  # T is what it is bound to: fewer samples do
        scales = scales[2::2]
    generator = torch.Generator().manual_seed(len(scales))
    like, scale = net.weights[0].detach(), torch.tensor(scales, device="cpu").view(-1, 1, 1)
    shape = len(scales), tokens, net.spec.hidden
    # The device is said: inside `with torch.device("cuda")` a CPU generator would be refused.
    how: Any = {"generator": generator, "device": "cpu"}
    return [(torch.randn(shape, **how) * scale).to(like) for _ in range(3)]


def _tokens_and_tables(
    spec: NetSpec, rope: bool, grad: bool, device: torch.device
) -> tuple[int, CosSin | None]:
    """Tables of another base than the usual one, which a module might compute itself."""
    tokens = max(block.tokens for block in spec.blocks) or TOKENS[0 if grad else 1]
    if not rope:
        return tokens, None
    head_dim = next(block.head_dim for block in spec.blocks if block.kind == ATTENTION)
    return tokens, rope_tables(tokens, head_dim, base=500.0, device=device)


def _fresh_copy(
    module: Any, generator: torch.Generator, device: torch.device, dtype: torch.dtype | None
) -> tuple[Any, Net]:
    """A copy with random weights: rows of several sizes, so that every activation is seen."""
    memo: dict[int, Any] = {}
    for old in read_stack(module).weights:
        weight = torch.empty(old.shape, device="cpu").uniform_(-1.7, 1.7, generator=generator)
        rows = torch.linspace(-1, 1, len(weight), device="cpu").view(-1, *[1] * (weight.ndim - 1))
        weight *= 4**rows / (old[0].numel() ** 0.5)
        leaf = _leaf(old)
        memo[id(leaf)] = nn.Parameter(weight.to(device, dtype or old.dtype).view(leaf.shape))
    own = copy.deepcopy(module, memo)
    return own, read_stack(own)


def _leaf(weight: Tensor) -> Tensor:
    """The parameter of which a flattened weight is a view."""
    base = weight._base
    return weight if base is None or isinstance(weight, nn.Parameter) else base


def _numbers(module: Any) -> dict[tuple[nn.Module, str], int]:
    own = ((m, name, value) for m in _modules(module) for name, value in vars(m).items())
    return {(m, name): value for m, name, value in own if type(value) is int}


def _modules(module: Any) -> Iterator[nn.Module]:
    for part in (module,) if isinstance(module, nn.Module) else layers_of(module):
        yield from part.modules()


def random_state(device: torch.device) -> Any:
    numpy = sys.modules.get("numpy")
    arrays = [torch.get_rng_state()]
    if device.type == "cuda":
        arrays.append(torch.cuda.get_rng_state(device))
    kept = [array.numpy().tobytes() for array in arrays]
    return kept, random.getstate(), numpy and str(numpy.random.get_state()[1:3])


@contextlib.contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Nobody outside sees what runs inside, nor do modes of outside matter: dispatch modes,
    transforms, tracing, autocast, inference mode, default devices, random states."""
    from torch.utils._python_dispatch import _disable_current_modes

    python, tracing = random.getstate(), torch._C._get_tracing_state()
    numpy = sys.modules.get("numpy")
    kept = numpy and numpy.random.get_state()
    precision = torch.get_float32_matmul_precision()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_float32_matmul_precision, precision)
        torch.set_float32_matmul_precision("highest")  # TF32 would be told as a difference
        stack.callback(random.setstate, python)
        if numpy:
            stack.callback(numpy.random.set_state, kept)
        if tracing is not None:
            torch._C._set_tracing_state(None)
            stack.callback(torch._C._set_tracing_state, tracing)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

            stack.enter_context(temporarily_clear_interpreter_stack())
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.device(device))
        for kind in {"cpu", device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield
