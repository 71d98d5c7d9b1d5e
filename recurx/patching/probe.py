"""The behavioural check before a swap: original and replacement side by side on a random batch.

Structure says what a module has, not what it does with it: an added residual, another order of
the calls or another gradient window show only here.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from recurx.errors import UnsupportedModel
from recurx.patching.handle import original
from recurx.patching.sharded import nets_of
from recurx.plan import count
from recurx.probing import random_state
from recurx.problem import Problem
from recurx.proof import without_compile

# Above this (original and replacement together) the probe takes one sample and 2 x 2 cycles: about
# as much work as one supervision step of the model.
_FULL_PROBE_FLOP = 1e10
# Allowed relative error when the bits differ: attention kernels other than PyTorch's round
# otherwise, and free-running bf16 amplifies it (0.03 measured after 21 calls). Gradients of a bf16
# embedding are summed in bf16 by the original (0.004 measured). Wrong code gives ~1.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.15
_GRADIENT_TOLERANCE = 0.05
_GRADIENT = "gradient of "
_SMALL = 1 << 20  # elements; larger buffers are tables, which only optimisers write

Result = dict[str, Tensor]


def probe_forward(module: nn.Module, adapter: Any) -> str:
    """Run `module.forward` of its class and its replacement on equal input; compare all they give.

    On a CPU the states are fp32 whatever the model's dtype: embeddings are promoted, rounding is
    sharper, and bf16 is slow on most CPUs. Elsewhere kernels may take the model's dtype only.

    Args:
        module: the module.
        adapter: `Official` or one like it; makes the replacement and its problem from the present
            settings.

    Returns:
        What was compared, in a sentence.

    Raises:
        UnsupportedModel: outputs, carry or gradients differ; the message names the first.
    """
    if any(p.is_meta for p in (*module.parameters(), *module.buffers())):
        return "not probed: the weights are on the meta device"
    config = adapter.settings(module)
    problem = adapter.problem(module, adapter.recipe(module, "eager"))
    small = _flop(problem, batch=2) <= _FULL_PROBE_FLOP
    counts = (config.H_cycles, config.L_cycles)
    if not small:
        counts = (min(2, counts[0]), min(2, counts[1]))
    dtype = torch.float32 if problem.device_type == "cpu" else problem.dtype
    with (
        undisturbed(module, None), torch.inference_mode(False), torch.enable_grad(),
        cheap(module, config, *counts), next(module.parameters()).device,
    ):  # fmt: skip
        module.eval()  # and at each comparison again, which ends in training mode
        recipe = adapter.recipe(module, "eager")
        tables = getattr(module, adapter.rotary)() if recipe.rope else None
        given = MethodType(adapter.replacement(recipe), module)
        before = MethodType(original(type(module), adapter.method), module)
        batch, carry = _random_input(module, adapter, 2 if small else 1, dtype)
        arguments, x = (carry, batch), adapter.embed(module, batch)

        def both() -> tuple[Result, Result]:
            module.eval()
            want, got = _both(module, adapter, before, given, arguments)
            with _training(module, x.detach()) as mode:
                if isinstance(nets_of(recipe, adapter.modules(module, recipe), tables), str):
                    return want, got  # adapters with dropout, say: then its own code runs
                want_too, got_too = _both(module, adapter, before, given, arguments)
            want |= {f"{name}{mode}": tensor for name, tensor in want_too.items()}
            return want, got | {f"{name}{mode}": tensor for name, tensor in got_too.items()}

        want, got = both()
        with _wide_tables(module) as narrow:
            exact = both()[0] if narrow else want
    how = f"{counts[0]} x {counts[1]} cycles, B={2 if small else 1}, {str(dtype)[6:]}"
    said = f"probed against the original ({how}): {_compare(got, exact, dtype, how)}"
    if narrow and dtype.itemsize > narrow.itemsize:
        # What the rounding itself does is the original's own error, however far it leads.
        error = max(_error(want[name], exact[name]) for name in want)
        said += f" where it does not round q and k to its tables' {str(narrow)[6:]}, which is "
        said += f"an error of its own of {error:.1e}"
    return said


def _compare(got: Result, want: Result, dtype: torch.dtype, how: str) -> str:
    """Say how near outputs and gradients are; raise if either is too far."""
    outputs = [name for name in want if not name.startswith(_GRADIENT)]
    gradients = [name for name in want if name.startswith(_GRADIENT)]
    forward = _TOLERANCE.get(dtype, _HALF_TOLERANCE)
    said = []
    for kind, names, tolerance in (
        ("logits and carry", outputs, forward),
        ("gradients", gradients, max(forward, _GRADIENT_TOLERANCE)),
    ):
        if not names:
            continue
        error, name = max((_error(got[name], want[name]), name) for name in names)
        if not error <= tolerance:
            raise UnsupportedModel(
                f"it computes something else: {name} differs from the original's by {error:.2g} "
                f"of its norm (allowed {tolerance}; {how})"
            )
        same = all(torch.equal(got[name], want[name]) for name in names)
        said.append(f"{kind} {'bit-identical' if same else f'within {error:.1e}'}")
    return ", ".join(said)


def _flop(problem: Problem, batch: int) -> float:
    """Both runs, forward of all calls and backward of the window."""
    schedule, specs = problem.schedule, dict(problem.nets)
    calls = [
        sum(stage.flops for stage in count.stages(specs[step.net], batch, problem.tokens))
        for step in schedule.steps
    ]
    return 2 * (sum(calls) + 2 * sum(calls[schedule.grad_from :]))


@contextlib.contextmanager
def _wide_tables(module: Any) -> Iterator[torch.dtype | None]:
    """Inside, rotary tables that `module.to(bfloat16)` rounded have these values in fp32; their
    dtype, or None if there are no such."""
    holders = [getattr(module, name, None) for name in ("rotary_emb", "pos_embedding")]
    narrow = {
        (holder, name): table
        for holder in holders
        for name, table in (holder.named_buffers() if isinstance(holder, nn.Module) else ())
        if table.is_floating_point() and table.dtype.itemsize < 4
    }
    try:
        for (holder, name), table in narrow.items():
            holder._buffers[name] = table.float()
        yield next((table.dtype for table in narrow.values()), None)
    finally:
        for (holder, name), table in narrow.items():
            holder._buffers[name] = table


@contextlib.contextmanager
def cheap(module: nn.Module, config: Any, h_cycles: int, l_cycles: int) -> Iterator[None]:
    """Other cycles, and nets that were compiled alone run plainly, for a moment: nothing is worth
    compiling here."""
    before, children = (config.H_cycles, config.L_cycles), dict(module._modules)
    config.H_cycles, config.L_cycles = h_cycles, l_cycles
    module._modules.update({name: without_compile(child) for name, child in children.items()})
    try:
        yield
    finally:
        module._modules.update(children)
        config.H_cycles, config.L_cycles = before


def _random_input(
    module: nn.Module, adapter: Any, batch: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Any]:
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(0)
    carry = empty_carry(module, batch, device)
    states = {
        name: torch.randn(state.shape, generator=generator, device="cpu").to(device, dtype)
        for name, state in vars(carry).items()
        if isinstance(state, Tensor)
    }
    names, settings = (adapter.inputs, adapter.labels), adapter.settings(module)
    return random_batch(settings, batch, generator, device, names), type(carry)(**states)


def empty_carry(module: Any, batch: int, device: torch.device) -> Any:
    """The carry of a module whose own code takes a batch size, or a device too."""
    wanted = len(inspect.signature(module.empty_carry).parameters)
    with device:
        return module.empty_carry(*(batch, device)[:wanted])


def random_batch(
    config: Any,
    batch: int,
    generator: torch.Generator,
    device: torch.device,
    names: tuple[str, str] = ("inputs", "labels"),
) -> dict[str, Tensor]:
    """Random tokens under `names`, [B, seq_len], and puzzle ids [B], int32, for the settings of
    official code or nano-trm."""
    rows = getattr(config, "num_puzzle_identifiers", getattr(config, "num_puzzles", 1))
    limits = {name: (config.vocab_size, (batch, config.seq_len)) for name in names}
    limits["puzzle_identifiers"] = (max(1, rows), (batch,))
    # NOTE: the device is said: under `with torch.device("cuda")` a CPU generator would be refused.
    how: Any = {"generator": generator, "dtype": torch.int32, "device": "cpu"}
    return {
        name: torch.randint(limit, size, **how).to(device) for name, (limit, size) in limits.items()
    }


def probe_method(module: Any, adapter: Any, arguments: tuple[Any, ...], how: str) -> str:
    """`probe_forward` of a method that takes other arguments, which are given; tensors among them
    may want gradient."""
    given = MethodType(adapter.replacement(adapter.recipe(module, "eager")), module)
    before = MethodType(original(type(module), adapter.method), module)
    want, got = {}, {}
    with undisturbed(module, None), torch.inference_mode(False), torch.enable_grad():
        for mode in ("", " in training"):
            module.train(bool(mode))
            for total, part in zip(
                (want, got), _both(module, adapter, before, given, arguments), strict=True
            ):
                total |= {name + mode: tensor for name, tensor in part.items()}
    dtype = next(iter(want.values())).dtype
    return f"probed against the original ({how}): {_compare(got, want, dtype, how)}"


def _both(
    module: nn.Module, adapter: Any, before: Any, given: Any, arguments: tuple[Any, ...]
) -> tuple[Result, Result]:
    """What original and replacement give; both must draw the same random numbers."""
    device = next(module.parameters()).device
    arguments = tuple(_Asked(a) if isinstance(a, dict) else a for a in arguments)
    states, results = [], []
    for who, forward in (("the original", before), ("recurx", given)):
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            results.append(_run(who, module, adapter, forward, arguments))
            states.append(random_state(device))
    for batch in arguments:
        if isinstance(batch, _Asked) and (unknown := batch.asked - batch.keys()):
            raise UnsupportedModel(
                f"it looks for {sorted(unknown)} in a batch, which recurx does not"
            )
    if states[0] != states[1] and not adapter.draws:
        mode = "training" if module.training else "evaluation"
        raise UnsupportedModel(
            f"it draws random numbers around its nets (dropout, noise) in {mode} mode"
        )
    return results[0], results[1]


class _Asked(dict[str, Tensor]):
    """A batch that knows what it was asked for."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        super().__init__(batch)
        self.asked: set[Any] = set()

    def __getitem__(self, key: Any) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: Any) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


@contextlib.contextmanager
def _training(module: Any, x: Tensor) -> Iterator[str]:
    """Training mode with the embedded input of evaluation: a sparse embedding keeps what it is
    asked for in training, and for its own batch size only."""
    kept = dict(vars(module))
    module.train()
    vars(module)["_input_embeddings"] = lambda *_, **__: x
    try:
        yield " in training"
    finally:
        vars(module).pop("_input_embeddings")
        vars(module).update({n: v for n, v in kept.items() if n == "_input_embeddings"})


def _run(
    who: str,
    module: nn.Module,
    adapter: Any,
    forward: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> Result:
    try:
        result = adapter.results(forward(*arguments))
    except Exception as error:  # anything may be wrong with code that we do not know
        what = f"{type(error).__name__}: {error}"
        raise UnsupportedModel(f"on a small random batch {who} fails with {what}") from error
    leaves = {_GRADIENT + name: p for name, p in module.named_parameters() if p.requires_grad}
    leaves |= {f"{_GRADIENT}argument {n}": a for n, a in enumerate(arguments)
               if isinstance(a, Tensor) and a.requires_grad}  # fmt: skip
    answers = [tensor.float() for tensor in result.values() if tensor.requires_grad]
    if leaves and answers:
        loss = torch.stack([answer.square().mean() + answer.mean() for answer in answers]).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        result |= dict(zip(leaves, grads, strict=True))
    return {name: tensor.detach() for name, tensor in result.items()}


@contextlib.contextmanager
def undisturbed(module: nn.Module, training: bool | None) -> Iterator[None]:
    """Afterwards all flags, the small buffers (running means, say) and the random state are as
    before; None leaves the mode inside."""
    flags = [(child, child.training) for child in module.modules()]
    # NOTE: a batch norm writes its running means without a trace in their version counters.
    small = [(b, b.clone()) for b in module.buffers() if b.numel() < _SMALL and not b.is_meta]
    devices = [p.device for p in module.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices):
        try:
            if training is not None:
                module.train(training)
            yield
        finally:
            for child, training in flags:
                child.training = training
            for buffer, before in small:
                if not torch.equal(buffer, before):
                    buffer.detach().copy_(before)


def _error(got: Tensor, want: Tensor) -> float:
    norm = want.double().norm()
    difference = (got.double() - want.double()).norm()
    if not torch.isfinite(difference):
        return float("inf")
    return float(difference / norm) if norm else float(difference)
