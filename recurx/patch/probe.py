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
from recurx.problem import Problem

# Original and replacement together; about two seconds on two laptop cores.
_CPU_BUDGET_FLOP = 2e11
# Allowed relative error when the bits differ: attention kernels other than PyTorch's round
# otherwise, and 21 free-running calls in bf16 amplify it (0.03 measured). Wrong code gives ~1.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.15

Result = dict[str, Tensor]


def probe_forward(
    module: nn.Module, replacement: Callable[..., Any], problem: Problem, force: bool
) -> str:
    """Run `module.forward` of its class and `replacement` on equal input; compare all they give.

    Returns:
        What was compared, in a sentence.

    Raises:
        UnsupportedModel: outputs, carry or gradients differ; the message names the first.
    """
    if any(p.is_meta for p in (*module.parameters(), *module.buffers())):
        return "not probed: the weights are on the meta device"
    fast = problem.device_type != "cpu"
    batch_size = next((b for b in (2, 1) if fast or _flop(problem, b) < _CPU_BUDGET_FLOP), 0)
    if not batch_size and not force:
        return "not probed: too much work for this CPU; patch(model, probe=True) insists"
    batch_size = batch_size or 1
    with _undisturbed(module):
        batch, carry = _random_input(module, batch_size)
        original = MethodType(type(module).forward, module)
        want = _run("the original", module, original, carry, batch)
        got = _run("recurx", module, MethodType(replacement, module), carry, batch)
    if all(torch.equal(got[name], want[name]) for name in want):
        return f"probed: {_kinds(want)} bit-identical to the original (B={batch_size})"
    tolerance = _TOLERANCE.get(problem.dtype, _HALF_TOLERANCE)
    worst = max((_error(got[name], want[name]), name) for name in want)
    if not worst[0] <= tolerance:
        raise UnsupportedModel(
            f"it computes something else: {worst[1]} differs from the original's by "
            f"{worst[0]:.2g} of its norm (allowed {tolerance})"
        )
    return (
        f"probed: {_kinds(want)} within {worst[0]:.1e} of the original (B={batch_size}, "
        f"worst in {worst[1]})"
    )


def _flop(problem: Problem, batch: int) -> float:
    """Both runs, forward of all calls and backward of the window."""
    per_call = {}
    for name, spec in problem.nets:
        sizes = [rows * columns for block in spec.blocks for rows, columns in block.weight_shapes]
        per_call[name] = 2 * sum(sizes) * problem.tokens
    schedule = problem.schedule
    calls = [per_call[step.net] for step in schedule.steps]
    return float(2 * batch * (sum(calls) + 2 * sum(calls[schedule.grad_from :])))


def _random_input(module: Any, batch: int) -> tuple[dict[str, Tensor], Any]:
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(0)
    config = module.config
    with torch.device(device):
        carry = module.empty_carry(batch)
    for state in vars(carry).values():
        state.copy_(torch.randn(state.shape, generator=generator))
    vocab, rows = config.vocab_size, max(1, getattr(config, "num_puzzle_identifiers", 1))
    inputs = torch.randint(0, vocab, (batch, config.seq_len), generator=generator)
    puzzles = torch.randint(0, rows, (batch,), generator=generator, dtype=torch.int32)
    return {"inputs": inputs.to(device), "puzzle_identifiers": puzzles.to(device)}, carry


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
    names, leaves = _leaves(module)
    if leaves and logits.requires_grad:
        loss = logits.float().square().mean() + q_halt.sum() - q_continue.sum()
        grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
        result |= {f"gradient of {name}": g for name, g in zip(names, grads, strict=True)}
    return {name: tensor.detach() for name, tensor in result.items()}


def _leaves(module: nn.Module) -> tuple[list[str], list[Tensor]]:
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    return [name for name, _ in named], [p for _, p in named]


@contextlib.contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradient, then every flag and the random state as before."""
    flags = [(child, child.training) for child in module.modules()]
    devices = [p.device for p in module.parameters() if p.device.type == "cuda"][:1]
    with (
        torch.random.fork_rng(devices=devices),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        try:
            module.eval()
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


def _kinds(result: Result) -> str:
    gradients = any(name.startswith("gradient") for name in result)
    return "logits, carry and gradients" if gradients else "logits and carry"
