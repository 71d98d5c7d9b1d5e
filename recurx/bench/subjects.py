"""One variant of one case as an object that steps, in each mode.

A subject has `step()` (one unit of work, not waited for), `outputs()` (after the first step: what
is compared with the reference) and `facts()` (what a row says besides times).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recurx import train
from recurx.api import recurse
from recurx.bench import official
from recurx.bench.cases import SOLVE_STEPS, build, case, sample
from recurx.bench.variants import Variant
from recurx.models import ACTLossHead, RecursiveModel
from recurx.solve import Answers, solve

CHECK_ROWS = 64  # samples are independent: more rows would prove no more
LR, BETAS, DECAY = 1e-4, (0.9, 0.95), 1.0  # published
NET_FILE = "trained.safetensors"  # of a case that solves, in the group's folder

Outputs = dict[str, Tensor]


def subject(
    case_name: str, mode: str, variant: Variant, batch: int, device: str, unit: str, folder: str
) -> Any:
    """The subject of a variant; `unit` is what torch.compile compiles, "net" or "step"."""
    made = {"step": StepSubject, "train": TrainSubject, "solve": SolveSubject}[mode]
    return made(case_name, variant, batch, device, unit, folder)


# ---- how PyTorch runs it -------------------------------------------------------------------------


def compile_nets(model: RecursiveModel, options: dict[str, str], dynamic: bool) -> None:
    """Each net of the model as one compiled call.

    NOTE: a whole step as one graph unrolls to 21 calls, which takes minutes to compile on two cores
    and runs no faster on a CPU.
    """
    inner = model.inner
    tables = inner.cos_sin()
    # A partial hides the module's layers, so that `recurse` calls it instead of looking inside.
    nets = {
        name: functools.partial(
            torch.compile(net, dynamic=dynamic or None, **options), cos_sin=tables
        )
        for name, net in inner.nets().items()
    }
    inner.nets = lambda: nets  # type: ignore[method-assign, assignment]


def freeze() -> None:
    """Let the compiler treat weights as constants, in this process."""
    import torch._inductor.config as inductor

    inductor.freezing = True


def capture(step: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """`step` as one CUDA graph: its replay, and the (static) results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # lazy initialisation must not be captured
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph.replay, results


# ---- inference -----------------------------------------------------------------------------------


class StepSubject:
    """One supervision step, from the same carry every time."""

    def __init__(
        self, name: str, variant: Variant, batch: int, device: str, unit: str, folder: str
    ) -> None:
        self.variant = variant
        self.model = build(name, variant.dtype, variant.backend, 1).to(device)
        data, carry = sample(self.model, batch)
        self.data = {key: value.to(device) for key, value in data.items()}
        self.carry = {key: value.to(device) for key, value in carry.items()}
        self.run: Callable[..., Any] = self.model.inner
        way = variant.way
        if variant.engine == "tuned":
            freeze()
            self.model.to(self.model.config.dtype)
        if way is not None and way.compile is not None:
            if unit == "net":
                compile_nets(self.model, way.compile, dynamic=False)
            else:
                self.run = torch.compile(self.model.inner, dynamic=False, **way.compile)
        self.replay: Callable[[], Any] | None = None
        self.results: Any = None

    @torch.no_grad()
    def step(self) -> None:
        if self.variant.captured:
            if self.replay is None:
                self.replay, self.results = capture(lambda: self.run(self.carry, self.data))
            self.replay()
        else:
            if self.variant.engine == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            self.results = self.run(self.carry, self.data)

    @torch.no_grad()
    def outputs(self) -> Outputs:
        states, logits, _ = self.results
        found = {"logits": logits[:CHECK_ROWS].float().cpu()}
        found |= {name: z[:CHECK_ROWS].float().cpu() for name, z in states.items()}
        if self.variant.ours or self.variant.engine == "eager":
            found |= self._one_call()
        return found

    def _one_call(self) -> Outputs:
        """The state after the first call alone: it has no drift yet to hide an error in."""
        inner = self.model.inner
        rows = slice(None, CHECK_ROWS)
        x = inner.embed(self.data["inputs"][rows], self.data["puzzle_identifiers"][rows])
        carry = {name: z[rows].contiguous() for name, z in self.carry.items()}
        out = recurse(
            inner.schedule, inner.nets(), x, carry, backend=self.variant.backend,
            cos_sin=inner.cos_sin(), stop_after=1,
        )  # fmt: skip
        return {"one call": out[inner.schedule.steps[0].write].float().cpu()}

    def facts(self) -> dict[str, Any]:
        return {}


# ---- training ------------------------------------------------------------------------------------


class TrainSubject:
    """One training step after another, on one batch of random labels.

    PyTorch's ways take loss, optimiser, weight average and embedding update as official loops do
    (`official.py`), recurx its own.
    """

    def __init__(
        self, name: str, variant: Variant, batch: int, device: str, unit: str, folder: str
    ) -> None:
        self.variant, self.batch = variant, batch
        self.model = build(name, variant.dtype, variant.backend, batch).to(device).train()
        data, _ = sample(self.model, batch)
        self.data = {key: value.to(device) for key, value in data.items()}
        self.carry = self.model.initial_carry(self.data)
        self.parameters = list(self.model.parameters())
        self.loss = torch.zeros(())
        settings: dict[str, Any] = {"lr": LR, "betas": BETAS, "weight_decay": DECAY}
        ours = variant.ours
        loss = "fused_stablemax_cross_entropy" if ours else "stablemax_cross_entropy"
        self.head: Callable[..., Any] = ACTLossHead(self.model, loss)
        made = train.AdamATan2 if ours else official.AdamATan2
        self.optimizer = made(self.parameters, **settings)
        self.average = (train.Average if ours else official.Average)(self.model, 0.999)
        self.rows = (
            list(self.model.puzzle_emb.buffers()) if self.model.config.puzzle_emb_ndim else []
        )
        self.sparse = train.SparseSignSGD(self.rows, LR, DECAY) if ours and self.rows else None
        way = variant.way
        if way is not None and way.compile is not None:
            if unit == "net":
                compile_nets(self.model, way.compile, dynamic=False)
            else:
                self.head = torch.compile(self.head, dynamic=False, **way.compile)

    def step(self) -> None:
        if self.variant.engine == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        carry, loss, _, _, _ = self.head(carry=self.carry, batch=self.data)
        if self.variant.engine == "reduce-overhead":  # the next run overwrites what this one wrote
            carry.inner_carry = {name: z.clone() for name, z in carry.inner_carry.items()}
        self.carry, self.loss = carry, loss.detach()
        (loss / self.batch).backward()
        self.optimizer.step()
        if self.sparse is not None:
            self.sparse.step()
            self.sparse.zero_grad()
        elif self.rows:
            official.sign_sgd_(*train.optim.embedding_buffers(self.rows), LR, DECAY)
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.model)

    def outputs(self) -> Outputs:
        """Of the first step: its loss, and its gradient out of the optimiser's mean, which is then
        (1 - beta1) times it."""
        means = [self.optimizer.state[p].get("exp_avg", p.detach() * 0) for p in self.parameters]
        gradient = torch.cat([mean.flatten() for mean in means]).float().cpu() / (1 - BETAS[0])
        return {"loss": self.loss.float().cpu() / self.batch, "gradient": gradient}

    def facts(self) -> dict[str, Any]:
        return {}


# ---- solving -------------------------------------------------------------------------------------


def train_net(name: str, folder: str) -> None:
    """Train the net that every variant of the group loads."""
    from recurx.checkpoint import save_checkpoint
    from recurx.train import Trainer, preset

    chosen = case(name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nets 64 wide gain nothing from a second thread
    trainer = Trainer(preset(chosen.preset, chosen.task))
    for _ in range(chosen.train_steps):
        trainer.train_step()
    save_checkpoint(Path(folder) / NET_FILE, trainer.averaged(), {"task": chosen.task})
    torch.set_num_threads(threads)


class SolveSubject:
    """`recurx.solve` on B puzzles that training never saw.

    PyTorch's ways run all 16 steps, as official evaluation does, except `eager-halt`.
    """

    def __init__(
        self, name: str, variant: Variant, batch: int, device: str, unit: str, folder: str
    ) -> None:
        from recurx import tasks
        from recurx.checkpoint import load_checkpoint

        self.variant = variant
        self.task = tasks.get(case(name).task)
        dtype = {"bf16": "bfloat16", "fp32": "float32"}[variant.dtype]
        loaded = load_checkpoint(Path(folder) / NET_FILE, forward_dtype=dtype)
        self.model = loaded.build(backend=variant.backend).to(device)
        examples = tasks.Sampler(self.task, 0, "held-out").draw(batch)
        self.examples = examples
        self.data = {"inputs": torch.from_numpy(examples.inputs).to(device)}
        self.halt = "q" if variant.ours or variant.engine == "eager-halt" else None
        way = variant.way
        if way is not None and way.compile is not None:
            compile_nets(self.model, way.compile, dynamic=False)
        self.answers: Answers | None = None

    def step(self) -> None:
        self.answers = solve(self.model, self.data, max_steps=SOLVE_STEPS, halt=self.halt)

    def outputs(self) -> Outputs:
        assert self.answers is not None
        name = "answers at the halt" if self.halt else "answers after all steps"
        return {name: self.answers.predictions.cpu()}

    def facts(self) -> dict[str, Any]:
        assert self.answers is not None
        answers = self.answers.predictions.cpu().numpy()
        right = self.task.check(self.examples.inputs, answers)
        return {
            "exact": float(right.mean()),
            "steps_mean": float(self.answers.rollout_steps.float().mean()),
            "puzzles": len(self.answers),
        }
