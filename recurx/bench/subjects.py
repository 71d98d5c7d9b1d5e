"""One variant of one case as an object that steps, in each mode.

A subject has `step()` (one unit of work, not waited for), `outputs()` (after the first step: what
is compared with the reference) and `facts()` (what a row says besides times).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recurx.api import recurse
from recurx.bench.cases import HALT_ABOVE, SOLVE_STEPS, build, case, sample, train_net
from recurx.bench.peers import peer
from recurx.bench.pytorch_ways import Outputs, capture, compile_nets, freeze
from recurx.bench.training import train_subject
from recurx.bench.variants import Variant
from recurx.solving.solve import Answers, solve

CHECK_ROWS = 64  # samples are independent: more rows would prove no more
ANSWERS = {"q": "answers at the halt", None: "answers after all steps"}
TOY_STEPS = 3
PEERS = ("openvino", "onnxruntime")


def subject(
    case_name: str, mode: str, variant: Variant, batch: int, device: str, unit: str, folder: str
) -> Any:
    """The subject of a variant; `unit` is what torch.compile compiles, "net" or "step"."""
    made: Any = {"step": StepSubject, "train": train_subject, "solve": SolveSubject}[mode]
    return made(case_name, variant, batch, device, unit, folder)


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
        if variant.engine in PEERS:
            self.run = _peer_run(name, variant, batch, folder)
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


def _peer_run(name: str, variant: Variant, batch: int, folder: str) -> Callable[..., Any]:
    """Another engine called as the model is: it takes and gives fp32."""
    run = peer(variant.engine, build(name, "fp32", "eager", 1), variant.dtype, batch, folder)

    def step(carry: Outputs, data: Outputs) -> Any:
        inputs = {key: data[key] for key in ("inputs", "puzzle_identifiers")}
        found = run(inputs | {key: state.float() for key, state in carry.items()})
        states = {key: found[f"new_{key}"] for key in carry}
        return states, found["logits"], (found["q_halt"], found["q_continue"])

    return step


# ---- solving -------------------------------------------------------------------------------------


def net_file(name: str, folder: str) -> Path:
    """The trained net of a case: the shipped one, or one that is hardly trained, in `folder`."""
    chosen = case(name)
    if chosen.net is not None:
        return chosen.net
    path = Path(folder) / "toy.safetensors"
    if not path.exists():
        train_net(chosen.task, TOY_STEPS, path)
    return path


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
        loaded = load_checkpoint(net_file(name, folder), forward_dtype=dtype)
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
        self.answers = self.solve(self.halt)

    def solve(self, halt: str | None) -> Answers:
        # Named, backend cuda solves inside its kernel instead of step by step from the host.
        inside = "cuda" if self.variant.backend == "cuda" else None
        return solve(
            self.model, self.data, SOLVE_STEPS, halt, halt_above=HALT_ABOVE, backend=inside
        )

    def outputs(self) -> Outputs:
        assert self.answers is not None
        found = {ANSWERS[self.halt]: self.answers.predictions.cpu()}
        if self.variant.engine == "eager":  # the yardstick of both ways to end
            found[ANSWERS["q"]] = self.solve("q").predictions.cpu()
        return found

    def facts(self) -> dict[str, Any]:
        assert self.answers is not None
        answers = self.answers.predictions.cpu().numpy()
        right = self.task.check(self.examples.inputs, answers)
        return {
            "exact": float(right.mean()),
            "steps_mean": float(self.answers.rollout_steps.float().mean()),
            "puzzles": len(self.answers),
        }
