"""What is right: eager fp32 results of a group, in slices of the batch, never timed."""

from __future__ import annotations

import torch
from torch import Tensor

from recurx.bench import subjects
from recurx.bench.cases import build, sample
from recurx.bench.variants import Variant
from recurx.models import ACTLossHead

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
    """Loss and gradient of the whole batch, added up over slices that fit into memory."""
    model = build(case, "fp32", "eager", batch).to(device).train()
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
