"""The step that is profiled: a supervision step, a training step, or a function of the user's."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recurx.bench.profiler.roles import roles_of
from recurx.bench.profiler.tracer import stage
from recurx.errors import bad_argument
from recurx.models.losses import ACTLossHead
from recurx.patching import probe
from recurx.patching.install import find


class Step:
    """Runs one step after the other, each going on from the carry of the last.

    Args:
        model: the module that is called.
        run: one step; returns what the model returned.
        kind: "supervision step", "training step" or "step", one of the user's.
    """

    def __init__(self, model: nn.Module, kind: str, run: Callable[[], Any]) -> None:
        self.model, self.kind, self._run = model, kind, run
        self.halted: Counter[int] = Counter()  # samples by the step at which they halt
        self.steps = 0
        self._open: Tensor | None = None  # samples that did not halt yet

    def __call__(self) -> None:
        self._run()

    def run_and_count(self) -> None:
        """One step, with its halting added to the histogram."""
        result = self._run()
        self.steps += 1
        carry = result[0] if isinstance(result, tuple) and result else None
        q = _halting_logits(result, self.model)
        if self.model.training and hasattr(carry, "halted"):
            self.halted.update(carry.steps[carry.halted].tolist())
        elif q is not None:
            wants = q[0] > q[1]
            alive = torch.ones_like(wants) if self._open is None else self._open
            count = int((alive & wants).sum())
            if count:
                self.halted[self.steps] += count
            self._open = alive & ~wants

    @property
    def still_open(self) -> int:
        """Samples that did not halt in the steps so far."""
        return 0 if self._open is None else int(self._open.sum())


def _halting_logits(result: Any, model: nn.Module) -> tuple[Tensor, Any] | None:
    """q_halt and what it must exceed, of what a model returned: 0, or q_continue (Q-learning)."""
    q_learning = not getattr(model_config(model), "no_ACT_continue", False)
    for item in result if isinstance(result, tuple) else ():
        if isinstance(item, Mapping) and "q_halt_logits" in item:
            bar = item.get("q_continue_logits", 0) if q_learning else 0
            return item["q_halt_logits"].detach(), bar
    return None


def model_config(model: nn.Module) -> Any:
    """The configuration of the ACT wrapper or inner module in `model`; None if there is none."""
    for module in model.modules():
        for name in ("config", "hparams"):  # official code's, and Lightning's
            config = getattr(module, name, None)
            if hasattr(config, "seq_len") and hasattr(config, "vocab_size"):
                return config
    return None


def device_of(model: nn.Module) -> torch.device:
    tensor = next(model.parameters(), None)
    return torch.device("cpu") if tensor is None else tensor.device


def random_batch(model: nn.Module, batch_size: int, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens, labels and puzzle ids for a model with an official configuration.

    Raises:
        InvalidArgument: the model has no `config` with seq_len and vocab_size.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model_config(model)
    if config is None:
        raise bad_argument(
            "profile", "batch", "a batch", None,
            "This model has no config with seq_len and vocab_size to draw one from; or give run=.",
        )  # fmt: skip
    names = ("input", "output") if _is_nano(model) else ("inputs", "labels")
    return probe.random_batch(config, batch_size, generator, device_of(model), names)


def _is_nano(model: nn.Module) -> bool:
    return any(getattr(adapter, "inputs", "") == "input" for _, _, adapter in find(model))


def initial_carry(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """The carry to start from: the model's own, or zero states for a bare inner module."""
    with torch.device(device_of(model)):
        for module in model.modules():
            if hasattr(module, "initial_carry"):
                return module.initial_carry(batch)
        for _, inner, _ in find(model):
            if hasattr(inner, "empty_carry"):
                carry = inner.empty_carry(next(iter(batch.values())).shape[0])
                states = carry if isinstance(carry, dict) else vars(carry)
                for state in states.values():
                    state.zero_()
                return carry
    raise bad_argument(
        "profile", "carry", "a carry", None,
        f"{type(model).__name__} has neither initial_carry nor empty_carry: give carry= or run=.",
    )  # fmt: skip


def supervision_step(model: nn.Module, batch: Mapping[str, Tensor], carry: Any) -> Step:
    """One call of the model without gradient, as evaluation does."""
    call = _caller(model, batch, carry)

    def run() -> Any:
        with torch.no_grad():
            return call()

    return Step(model, "supervision step", run)


def training_step(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    carry: Any,
    optimizers: Sequence[torch.optim.Optimizer],
    ema: Any,
) -> Step:
    """Forward, loss, backward, every optimiser, EMA: what the official training loop does."""
    if _is_nano(model):
        raise bad_argument(
            "profile", "train", "False for nano-trm, whose loss and optimisers are its own", True,
            "Give the step itself: run=lambda: model.training_step(batch, 0).",
        )  # fmt: skip
    head = model if _returns_loss(model) else ACTLossHead(model)
    call = _caller(head, batch, carry)
    size = next(iter(batch.values())).shape[0]
    puzzles = [m for m in model.modules() if hasattr(m, "sign_sgd_")]

    def run() -> Any:
        with torch.enable_grad():
            result = call()
            with stage("loss"):
                loss = _loss_of(result) / size
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for module in puzzles:
            with stage("optimizer: sign SGD of puzzle rows"):
                module.sign_sgd_(lr=1e-4)
        if ema is not None:
            with stage("ema"), torch.no_grad():
                ema.update(model)
        return result

    return Step(head, "training step", run)


def _returns_loss(model: nn.Module) -> bool:
    """Whether it is a loss head: it takes the official argument, or wraps an ACT wrapper."""
    while list(model._modules) == ["module"]:  # DDP and its kin
        model = model.get_submodule("module")
    if "return_keys" in inspect.signature(model.forward).parameters:
        return True
    role = roles_of(model).of.get(id(model))
    return role is not None and role.part == "loss"


def _caller(model: nn.Module, batch: Mapping[str, Tensor], carry: Any) -> Callable[[], Any]:
    """Calls the model, from the second time on with the carry that it returned."""
    arguments: dict[str, Any] = {"batch": batch, "carry": carry}
    if "return_keys" in inspect.signature(model.forward).parameters:
        arguments["return_keys"] = ["q_halt_logits", "q_continue_logits"]

    def call() -> Any:
        result = model(**arguments)
        arguments["carry"] = result[0]
        return result

    return call


def _loss_of(result: Any) -> Tensor:
    for item in result:
        if isinstance(item, Tensor) and item.ndim == 0 and item.requires_grad:
            return item
    raise bad_argument(
        "profile", "model", "a model that returns a scalar loss with gradient",
        [type(item).__name__ for item in result], "Give a loss head, or run=.",
    )  # fmt: skip


@contextlib.contextmanager
def undisturbed(
    model: nn.Module,
    training: bool | None,
    optimizers: Sequence[Any] = (),
    ema: Any = None,
    weights: bool = False,
) -> Iterator[None]:
    """Afterwards flags, random state and, with `weights`, all that training changes are as before.

    `training` is the mode inside; None leaves it.
    """
    tensors = [*model.parameters(), *model.buffers()] if weights else []
    saved = [tensor.detach().clone() for tensor in tensors]
    grads = [(p, p.grad) for p in tensors]
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    averages = copy.deepcopy(vars(ema)) if weights and ema is not None else None
    for parameter, _ in grads:
        parameter.grad = None
    with probe.undisturbed(model, training):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, before in zip(tensors, saved, strict=True):
                    tensor.copy_(before)
            for parameter, grad in grads:
                parameter.grad = grad
            for optimizer, state in zip(optimizers, states, strict=True):
                optimizer.load_state_dict(state)
            if averages is not None:
                vars(ema).update(averages)
