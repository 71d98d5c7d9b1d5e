"""Nothing that looks like a TRM is answered wrongly: its own answer, or a refusal by our own error.

Each case is a twisted net or an edited model, given to `recurx.recurse` or `recurx.patch`, in eval
and in training mode, by every backend that runs here. `RECURX_HOSTILE_CASES` sets how many random
sequences of edits run (2,000 take about ten minutes).
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import warnings
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recurx
from recurx.errors import RecurxError
from recurx.nets import rope_tables
from recurx.readings import read
from tests import lookalike
from tests.hostile.edits import EDITS
from tests.hostile.models import HEADS, SPELLED, TOKENS, TWISTS, WIDTH, model, stack

CASES = int(os.environ.get("RECURX_HOSTILE_CASES", "120"))
BACKENDS = ("eager", "cpu", "auto")
# fp32 of another order of sums, over six calls; every twist is at least 1e-3 away.
CLOSE = 3e-4
SCHEDULE = recurx.Schedule.trm(2, 2)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A net that runs its own code is said in a warning, which is right."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def distance(got: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> tuple[float, str]:
    """The largest relative difference, and where."""
    assert got.keys() == want.keys()
    worst = (0.0, "nothing")
    for name, ours in got.items():
        theirs = want[name]
        if (ours is None) != (theirs is None):
            # A gradient of zeros and none at all are the same to every optimiser step of ours.
            there = ours if theirs is None else theirs
            assert there is not None
            found = float(there.norm())
        elif ours is None or theirs is None or torch.allclose(ours, theirs, equal_nan=True):
            found = 0.0  # a net that overflows by itself overflows alike
        else:
            least = 1e-6 if theirs.ndim else 1.0  # a loss may be a small rest of large terms
            found = float((ours - theirs).norm() / theirs.norm().clamp_min(least))
        worst = max(worst, (found if found == found else float("inf"), name))
    return worst


def measured(net: nn.Module, run: Callable[[], list[Tensor]], x: Tensor) -> dict[str, Any]:
    """Results of `run`, and the gradients of their squares in training mode."""
    torch.manual_seed(7)
    random.seed(7)
    results = run()
    values: dict[str, Any] = {f"result {i}": r.detach() for i, r in enumerate(results)}
    if net.training:
        weights = {name: p for name, p in net.named_parameters() if p.requires_grad}
        leaves = {"x": x, **weights}
        loss = sum((r * torch.linspace(-1, 1, r.numel()).view(r.shape)).sum() for r in results)
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        values |= dict(zip((f"gradient of {name}" for name in leaves), grads, strict=True))
    return values


def own(net: Any, x: Tensor, carry: dict[str, Tensor], tables: Any) -> list[Tensor]:
    """The recursion in plain PyTorch, every call the net's own forward."""
    states = dict(carry)
    for number, step in enumerate(SCHEDULE.steps):
        with torch.set_grad_enabled(number >= SCHEDULE.grad_from):
            total = states[step.state[0]]
            if step.write == "z_L":
                total = total + (states["z_H"] + x)
            else:
                total = total + states["z_L"]
            states[step.write] = net(total, cos_sin=tables)
    return [states["z_H"], states["z_L"]]


def is_error(error: BaseException) -> bool:
    return isinstance(error, RecurxError)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("token_mlp", [False, True], ids=["attention", "tokens"])
@pytest.mark.parametrize("twist", ("", *TWISTS))
def test_a_net_that_looks_alike(twist: str, token_mlp: bool, training: bool) -> None:
    torch.manual_seed(3)
    x = torch.randn(3, TOKENS, WIDTH, requires_grad=training)
    carry = {name: torch.randn(3, TOKENS, WIDTH) for name in ("z_H", "z_L")}
    tables = None if token_mlp else rope_tables(TOKENS, WIDTH // (1 if "wide" in twist else HEADS))
    for backend in BACKENDS:
        # A net of its own each time: what counts calls must have counted the same.
        ours, theirs = (stack(twist, token_mlp).train(training) for _ in range(2))
        want = measured(theirs, lambda net=theirs: own(net, x, carry, tables), x)

        def run(net: nn.Module = ours, backend: str = backend) -> list[Tensor]:
            after = recurx.recurse(SCHEDULE, {"L": net}, x, carry, backend=backend, cos_sin=tables)
            return [after["z_H"], after["z_L"]]

        with quiet():
            try:
                got = measured(ours, run, x)
            except RecurxError:
                assert twist, f"the plain net was refused by {backend}"
                assert twist not in SPELLED or backend == "cpu"
                continue
        found, where = distance(got, want)
        assert found < CLOSE, f"{backend}: {where} is {found:.2g} from the net's own"
        if twist in SPELLED:
            assert read(ours, tables is not None) is not None, "it is spelled, so it is proved"


def trained(given: nn.Module, seed: int = 5) -> dict[str, Any]:
    """What a step of a model gives, and its gradients in training mode."""
    carry, batch = lookalike.inputs(given, batch=3)
    torch.manual_seed(seed)
    random.seed(seed)
    new, logits, loss = given(carry, batch)
    values: dict[str, Any] = {"logits": logits.detach(), "loss": loss.detach()}
    values |= {f"carry {name}": state.detach() for name, state in vars(new).items()}
    if given.training:
        given.zero_grad()
        loss.backward()
        values |= {f"gradient of {name}": p.grad for name, p in given.named_parameters()}
    return values


def compare(patched: nn.Module, twin: nn.Module, said: str) -> bool:
    """Whether the patched model answered; asserts that it then gave the twin's answer."""
    try:
        want = trained(twin)
    except (TypeError, ValueError, RuntimeError):  # edits may also leave a model that cannot run
        with quiet(), pytest.raises((TypeError, ValueError, RuntimeError, RecurxError)):
            trained(patched)
        return False
    with quiet():
        try:
            got = trained(patched)
        except RecurxError:
            return False
    found, where = distance(got, want)
    if found >= CLOSE:  # edits may leave a model that a rounding moves by more
        allowed = max(CLOSE, 3 * moved(twin, want))
        assert found < allowed, f"{said}: {where} is {found:.2g} from the model's own"
    return True


def moved(model: nn.Module, before: dict[str, Any]) -> float:
    """How far the results of a model move when every weight moves by a rounding; the larger of two
    draws."""
    weights, worst = list(model.parameters()), 0.0
    for seed in (1, 2):
        kept = [weight.detach().clone() for weight in weights]
        generator = torch.Generator().manual_seed(seed)
        for weight in weights:
            signs = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
            weight.data.mul_(1 + 2.0**-22 * signs)
        worst = max(worst, distance(trained(model), before)[0])
        for weight, value in zip(weights, kept, strict=True):
            weight.data.copy_(value)
    return worst if worst < float("inf") else 0.0


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("token_mlp", [False, True], ids=["attention", "tokens"])
@pytest.mark.parametrize("twist", ("", *TWISTS))
def test_a_model_that_looks_alike(twist: str, token_mlp: bool, training: bool) -> None:
    for backend in ("cpu", "auto"):
        ours, theirs = (model(twist, token_mlp) for _ in range(2))
        with quiet():
            try:
                recurx.patch(ours, backend=backend)
            except RecurxError:
                assert twist, f"the plain model was refused by {backend}"
                assert twist not in SPELLED or backend == "cpu"
                continue
        # The probe of patch ran nets as well: what counts calls starts anew.
        for module in ours.modules():
            if hasattr(module, "calls"):
                module.calls = 0
        compare(ours.train(training), theirs.train(training), backend)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("first_a_call", [False, True], ids=["unused", "used"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_after_the_patch(edit: str, first_a_call: bool, training: bool) -> None:
    for backend in ("cpu", "auto"):
        ours = model().train(training)
        if edit == "dropout_put_in" and not training:
            continue
        twin = copy.deepcopy(ours)
        with quiet():
            recurx.patch(ours, backend=backend)
        if first_a_call:
            assert compare(ours, twin, f"{backend}, before the edit")
        for given in (ours, twin):
            EDITS[edit](given, Random(11))
            given.train(training)
        compare(ours, twin, f"{backend}, {edit}")


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_before_the_patch(edit: str) -> None:
    for training in (False, True):
        ours = model()
        twin = copy.deepcopy(ours)
        for given in (ours, twin):
            EDITS[edit](given, Random(12))
        with quiet():
            try:
                recurx.patch(ours)
            except RecurxError:
                continue
        compare(ours.train(training), twin.train(training), edit)


def test_edits_one_after_the_other() -> None:
    """Random sequences of edits, steps between them, on models patched and not."""
    answered = 0
    for case in range(CASES):
        dice = Random(case)
        ours = model(token_mlp=False, seed=case)
        twin = copy.deepcopy(ours)
        with quiet():
            recurx.patch(ours, backend=dice.choice(["cpu", "auto"]))
        said = [f"case {case}"]
        for _ in range(dice.randint(1, 4)):
            name = dice.choice(sorted(EDITS))
            said.append(name)
            seed = dice.randrange(1 << 30)
            failed = []
            for given in (ours, twin):
                try:
                    EDITS[name](given, Random(seed))
                except (AttributeError, ValueError, RuntimeError, TypeError, KeyError) as error:
                    failed.append(type(error))  # an edit of what an earlier one took away
            assert len(failed) in (0, 2), said
            training = dice.random() < 0.5
            for given in (ours, twin):
                given.train(training)
            if dice.random() < 0.7:
                answered += compare(ours, twin, ", ".join(said))
    assert answered > CASES // 4, "nearly everything was refused: these edits show nothing"


def test_plain_models_are_fused() -> None:
    """The corpus says something only if what is plain does not run its own code."""
    for token_mlp in (False, True):
        handle = recurx.patch(model(token_mlp=token_mlp), backend="cpu")
        assert len(handle.report.patched) == 1
