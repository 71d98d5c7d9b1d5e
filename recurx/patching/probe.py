"""The behavioural check before a swap: original and replacement side by side on a random batch.

Structure says what a module has, not what it does with it: an added residual, another order of
the calls or another gradient window show only here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from recurx.errors import UnsupportedModel
from recurx.patching.adapter import Adapter
from recurx.patching.handle import original
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

Result = dict[str, Tensor]


def probe_forward(module: nn.Module, adapter: Adapter) -> str:
    """Run `module.forward` of its class and its replacement on equal input; compare all they give.

    On a CPU the states are fp32 whatever the model's dtype: embeddings are promoted, rounding is
    sharper, and bf16 is slow on most CPUs. Elsewhere kernels may take the model's dtype only.

    Args:
        module: the module; its `config` has H_cycles and L_cycles.
        adapter: makes the replacement and its problem from the present configuration.

    Returns:
        What was compared, in a sentence.

    Raises:
        UnsupportedModel: outputs, carry or gradients differ; the message names the first.
    """
    if any(p.is_meta for p in (*module.parameters(), *module.buffers())):
        return "not probed: the weights are on the meta device"
    config: Any = module.config
    problem = adapter.problem(module, adapter.recipe(module, "eager"))
    small = _flop(problem, batch=2) <= _FULL_PROBE_FLOP
    counts = (config.H_cycles, config.L_cycles)
    if not small:
        counts = (min(2, counts[0]), min(2, counts[1]))
    dtype = torch.float32 if problem.device_type == "cpu" else problem.dtype
    with (
        undisturbed(module, None), torch.inference_mode(False), torch.enable_grad(),
        _cycles(config, *counts), _uncompiled(module),
    ):  # fmt: skip
        module.eval()
        replacement = adapter.replacement(adapter.recipe(module, "eager"))
        batch, carry = _random_input(module, 2 if small else 1, dtype)
        given = MethodType(replacement, module)
        before = MethodType(original(type(module), "forward"), module)
        want, got = _both(module, before, given, carry, batch)
        with _training(module, batch) as mode:
            want_too, got_too = _both(module, before, given, carry, batch)
        want |= {f"{name}{mode}": tensor for name, tensor in want_too.items()}
        got |= {f"{name}{mode}": tensor for name, tensor in got_too.items()}
    how = f"{counts[0]} x {counts[1]} cycles, B={2 if small else 1}, {str(dtype)[6:]}"
    return f"probed against the original ({how}): {_compare(got, want, dtype, how)}"


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
def _cycles(config: Any, h_cycles: int, l_cycles: int) -> Iterator[None]:
    """The configuration with other cycles, for a moment."""
    before = config.H_cycles, config.L_cycles
    config.H_cycles, config.L_cycles = h_cycles, l_cycles
    try:
        yield
    finally:
        config.H_cycles, config.L_cycles = before


def _random_input(module: Any, batch: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], Any]:
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(0)
    with torch.device(device):
        carry = module.empty_carry(batch)
    states = {
        name: torch.randn(state.shape, generator=generator).to(device, dtype)
        for name, state in vars(carry).items()
    }
    return random_batch(module.config, batch, generator, device), type(carry)(**states)


def random_batch(
    config: Any, batch: int, generator: torch.Generator, device: torch.device
) -> dict[str, Tensor]:
    """Random tokens and labels [B, seq_len] and puzzle ids [B], int32, for an official `config`."""
    shape, rows = (batch, config.seq_len), max(1, getattr(config, "num_puzzle_identifiers", 1))
    limits = {
        "inputs": (config.vocab_size, shape),
        "labels": (config.vocab_size, shape),
        "puzzle_identifiers": (rows, (batch,)),
    }
    return {
        name: torch.randint(limit, size, generator=generator, dtype=torch.int32).to(device)
        for name, (limit, size) in limits.items()
    }


def _both(
    module: nn.Module, before: Any, given: Any, carry: Any, batch: dict[str, Tensor]
) -> tuple[Result, Result]:
    """What original and replacement give; both must draw the same random numbers."""
    device = next(module.parameters()).device
    states, results = [], []
    for who, forward in (("the original", before), ("recurx", given)):
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            results.append(_run(who, module, forward, carry, batch))
            states.append(random_state(device))
    if states[0] != states[1]:
        mode = "training" if module.training else "evaluation"
        raise UnsupportedModel(
            f"it draws random numbers around its nets (dropout, noise) in {mode} mode"
        )
    return results[0], results[1]


@contextlib.contextmanager
def _training(module: Any, batch: dict[str, Tensor]) -> Iterator[str]:
    """Training mode with the embedded input of evaluation: a sparse embedding keeps what it is
    asked for in training, and for its own batch size only."""
    x = module._input_embeddings(batch["inputs"], batch["puzzle_identifiers"]).detach()
    kept = dict(vars(module))
    module.train()
    vars(module)["_input_embeddings"] = lambda *_, **__: x
    try:
        yield " in training"
    finally:
        vars(module).pop("_input_embeddings")
        vars(module).update({n: v for n, v in kept.items() if n == "_input_embeddings"})


@contextlib.contextmanager
def _uncompiled(module: nn.Module) -> Iterator[None]:
    """Nets that were compiled alone run plainly, for a moment: nothing is worth compiling here."""
    children = dict(module._modules)
    module._modules.update({name: without_compile(child) for name, child in children.items()})
    try:
        yield
    finally:
        module._modules.update(children)


def _run(
    who: str, module: nn.Module, forward: Callable[..., Any], carry: Any, batch: dict[str, Tensor]
) -> Result:
    try:
        new, logits, (q_halt, q_continue) = forward(carry, batch)
    except Exception as error:  # anything may be wrong with code that we do not know
        what = f"{type(error).__name__}: {error}"
        raise UnsupportedModel(f"on a small random batch {who} fails with {what}") from error
    result = {"logits": logits, "q_halt": q_halt, "q_continue": q_continue}
    result |= {f"carry.{name}": state for name, state in vars(new).items()}
    leaves = {_GRADIENT + name: p for name, p in module.named_parameters() if p.requires_grad}
    if leaves and logits.requires_grad:
        loss = logits.float().square().mean() + q_halt.sum() - q_continue.sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        result |= dict(zip(leaves, grads, strict=True))
    return {name: tensor.detach() for name, tensor in result.items()}


@contextlib.contextmanager
def undisturbed(module: nn.Module, training: bool | None) -> Iterator[None]:
    """Afterwards all flags and the random state are as before; None leaves the mode inside."""
    flags = [(child, child.training) for child in module.modules()]
    devices = [p.device for p in module.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices):
        try:
            if training is not None:
                module.train(training)
            yield
        finally:
            for child, training in flags:
                child.training = training


def _error(got: Tensor, want: Tensor) -> float:
    norm = want.double().norm()
    difference = (got.double() - want.double()).norm()
    if not torch.isfinite(difference):
        return float("inf")
    return float(difference / norm) if norm else float(difference)
