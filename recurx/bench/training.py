"""Training steps as subjects: as official loops do them, and as recurx does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recurx import train
from recurx.api import recurse
from recurx.bench import official
from recurx.bench.cases import build, sample
from recurx.bench.pytorch_ways import Outputs, compile_nets
from recurx.bench.variants import Variant
from recurx.models import ACTLossHead, RecursiveModel
from recurx.schedule import Schedule
from recurx.train.optim import embedding_buffers

LR, BETAS, DECAY, EMA = 1e-4, (0.9, 0.95), 1.0, 0.999  # published
CALL_ROWS = 8  # samples of the gradient of a call: they are independent, more would prove no more


def call_gradient(model: RecursiveModel, batch: int, device: str) -> Tensor:
    """The gradient of one net call in x and the net's weights, flat and fp32, on the CPU: it has no
    drift yet to hide an error in."""
    inner, (_, carry) = model.inner, sample(model, batch)
    step = inner.schedule.steps[0]
    states = {name: state.to(device) for name, state in carry.items()}
    x = states[step.write].detach().clone().requires_grad_()
    out = recurse(
        Schedule((step,)), {step.net: inner.nets()[step.net]}, x, states,
        backend=model.backend, cos_sin=inner.cos_sin(),
    )[step.write]  # fmt: skip
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out * slope.to(out)).sum().backward()
    net = [p for p in inner.nets()[step.net].parameters() if p.grad is not None]
    found = [each.grad.flatten().float().cpu() for each in (x, *net)]
    model.zero_grad(set_to_none=True)
    return torch.cat(found)


def train_subject(
    name: str, variant: Variant, batch: int, device: str, unit: str, folder: str
) -> TrainSubject:
    """recurx's training step; of PyTorch's ways "graph" takes it too, with eager recursion."""
    made = OurTrainSubject if variant.ours or variant.captured else TrainSubject
    return made(name, variant, batch, device, unit)


class TrainSubject:
    """One training step after another, on one batch of random labels, as official loops do it.

    Loss in fp64; optimiser, weight average and embedding update of `official.py`.
    """

    loss_type = "stablemax_cross_entropy"

    def __init__(self, name: str, variant: Variant, batch: int, device: str, unit: str) -> None:
        self.variant, self.batch, self.unit = variant, batch, unit
        self.model = build(name, variant.dtype, variant.backend, batch).to(device).train()
        self.sample, _ = sample(self.model, batch)
        self.head = ACTLossHead(self.model, self.loss_type)
        self.parameters = list(self.model.parameters())
        has_table = self.model.config.puzzle_emb_ndim > 0
        self.rows = list(self.model.puzzle_emb.buffers()) if has_table else []
        self.call_gradient: Outputs = {}
        if variant.ours or variant.engine == "eager":
            found = call_gradient(self.model, min(batch, CALL_ROWS), device)
            self.call_gradient = {"gradient of a call": found}
        self.prepare(device)

    def prepare(self, device: str) -> None:
        self.data = {key: value.to(device) for key, value in self.sample.items()}
        self.carry = self.model.initial_carry(self.data)
        self.optimizer: torch.optim.Optimizer = official.AdamATan2(
            self.parameters, lr=LR, betas=BETAS, weight_decay=DECAY
        )
        self.average = official.Average(self.model, EMA)
        self.run: Callable[..., Any] = self.head
        way = self.variant.way
        if way is not None and way.compile is not None:
            if self.unit == "net":
                compile_nets(self.model, way.compile, dynamic=False)
            else:
                self.run = torch.compile(self.head, dynamic=False, **way.compile)

    def step(self) -> None:
        if self.variant.engine == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        carry, loss, _, _, _ = self.run(carry=self.carry, batch=self.data)
        if self.variant.engine == "reduce-overhead":  # the next run overwrites what this one wrote
            carry.inner_carry = {name: z.clone() for name, z in carry.inner_carry.items()}
        self.carry, self.last_loss = carry, loss.detach()
        (loss / self.batch).backward()
        self.optimizer.step()
        if self.rows:
            official.sign_sgd_(*embedding_buffers(self.rows), LR, DECAY)
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.model)

    def loss(self) -> float:
        """Of the last step, a sum over the batch."""
        return float(self.last_loss)

    def outputs(self) -> Outputs:
        """Of the first step: its loss, and its gradient out of the optimiser's mean, which is then
        (1 - beta1) times it."""
        means = [self.optimizer.state[p].get("exp_avg", p.detach() * 0) for p in self.parameters]
        gradient = torch.cat([mean.flatten() for mean in means]).float().cpu() / (1 - BETAS[0])
        found = {"loss": torch.tensor(self.loss() / self.batch), "gradient": gradient}
        return found | self.call_gradient

    def facts(self) -> dict[str, Any]:
        return {}


class OurTrainSubject(TrainSubject):
    """The same step by `recurx.train.CapturedStep`: one CUDA graph on a GPU."""

    loss_type = "fused_stablemax_cross_entropy"

    def prepare(self, device: str) -> None:
        settings: dict[str, Any] = {"lr": LR, "betas": BETAS, "weight_decay": DECAY}
        self.optimizer = train.AdamATan2(self.parameters, **settings)
        optimizers: list[torch.optim.Optimizer] = [self.optimizer]
        if self.rows:
            optimizers.append(train.SparseSignSGD(self.rows, LR, DECAY))
        queue = train.SampleQueue(lambda count: self.sample, self.batch, device)
        average = train.Average(self.model, EMA)
        self.step = train.CapturedStep(self.head, optimizers, queue, average=average)

    def loss(self) -> float:
        return self.step.metrics()["loss"]
