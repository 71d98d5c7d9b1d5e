"""What is right: eager results of a group, in slices of the batch, never timed.

In fp32; gradients on a CPU in fp64, since nothing else tells how far eager fp32 itself is off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recurx.bench import subjects
from recurx.bench.cases import build, build_exact, sample
from recurx.bench.checks import SPREAD, distance
from recurx.bench.training import CALL_ROWS, call_gradient
from recurx.bench.variants import Variant
from recurx.models import ACTLossHead, RecursiveModel

DRAWS = 8  # of the drift of eager fp32's gradient
EXACT = Variant("eager", "fp32")


def outputs(case: str, mode: str, batch: int, device: str, folder: str) -> dict[str, Tensor]:
    """{name: tensor} as the subjects of the mode name them, in fp32 on the CPU."""
    if mode == "train":
        return _training(case, batch, device)
    if mode == "solve":
        solver = subjects.SolveSubject(case, EXACT, batch, device, "net", folder)
        solver.step()
        return solver.outputs()
    subject = subjects.StepSubject(case, EXACT, batch, device, "net", folder)
    rows = slice(None, subjects.CHECK_ROWS)
    subject.data = {key: value[rows] for key, value in subject.data.items()}
    subject.carry = {key: value[rows] for key, value in subject.carry.items()}
    subject.step()
    return subject.outputs()


def _training(case: str, batch: int, device: str) -> dict[str, Tensor]:
    """Loss and gradient of the whole batch; on a CPU also how far eager fp32 is from them."""
    rows = min(batch, CALL_ROWS)
    if device != "cpu":  # GPUs are slow in fp64, and judged in bf16
        model = build(case, "fp32", "eager", batch).to(device)
        call = {"gradient of a call": call_gradient(model, rows, device)}
        return _gradient(model, batch, device) | call
    exact_model = build_exact(case, batch)
    exact = {"gradient of a call": call_gradient(exact_model, rows, device)}
    exact |= _gradient(exact_model, batch, device)
    squares = 0.0
    for draw in range(DRAWS):
        model = build(case, "fp32", "eager", batch)
        _round_anew(model, draw)
        found = _gradient(model, batch, device)
        squares += distance(found["gradient"], exact["gradient"]) ** 2 / DRAWS
    return exact | {"gradient" + SPREAD: torch.tensor(squares**0.5)}


def _round_anew(model: RecursiveModel, draw: int) -> None:
    """Move every start state by at most one rounding: all later roundings fall differently. The
    first draw moves nothing."""
    generator = torch.Generator().manual_seed(draw)
    for name, start in model.inner.named_buffers():
        if draw and name.endswith("_init"):
            by = torch.randint(-1, 2, start.shape, generator=generator)
            start.mul_(1 + by * torch.finfo(start.dtype).eps)


def _gradient(model: RecursiveModel, batch: int, device: str) -> dict[str, Tensor]:
    """Added up over slices that fit into memory."""
    model.train()
    data, _ = sample(model, batch)
    head = ACTLossHead(model)
    total = 0.0
    for first in range(0, batch, subjects.CHECK_ROWS):
        rows = slice(first, first + subjects.CHECK_ROWS)
        part = {key: value[rows].to(device) for key, value in data.items()}
        _, loss, _, _, _ = head(carry=model.initial_carry(part), batch=part)
        (loss / batch).backward()
        total += float(loss.detach()) / batch
    grads = [p.detach() * 0 if p.grad is None else p.grad for p in model.parameters()]
    grads = [grad.flatten() for grad in grads]
    return {"loss": torch.tensor(total), "gradient": torch.cat(grads).float().cpu()}
