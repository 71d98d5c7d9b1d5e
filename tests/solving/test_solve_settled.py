"""Halting and choice by how settled a row is: residuals of its state, entropies of its answer."""

from __future__ import annotations

import math

import pytest
import torch

import recurx
from recurx.models import HRM, TRM
from recurx.solving import halting_loop, on_cpu
from recurx.solving.rollouts import pick
from tests import official
from tests.solving.test_solve import BATCH, CountRows, fixed_loop, make_batch, make_model

STEPS = 8
ENGINES = ["eager"]
if recurx.backends.get("cpu").why_unavailable() is None:
    ENGINES.append("cpu")


def measured(model, batch) -> dict[str, list[list[float]]]:
    """[steps][rows] residuals and entropies, by hand, one token at a time."""
    name = "z_H" if "z_H" in model.inner.empty_carry(1) else "z"
    states = [model.inner.initial_states(len(batch["inputs"]))[name]]
    hook = lambda module, args, out: states.append(out[0][name])  # noqa: E731
    handle = model.inner.register_forward_hook(hook)
    outputs = fixed_loop(model, batch, STEPS)
    handle.remove()
    found: dict[str, list[list[float]]] = {"residual": [], "entropy": []}
    for before, after, said in zip(states[:-1], states[1:], outputs, strict=True):
        moved, doubt = [], []
        for row in range(len(after)):
            pairs = list(zip(before[row].double(), after[row].double(), strict=True))
            moved.append(sum(float((b - a).norm() / b.norm()) for a, b in pairs) / len(pairs))
            tokens = said["logits"][row].double().softmax(-1).tolist()
            bits = [-sum(p * math.log(p) for p in token if p) for token in tokens]
            doubt.append(sum(bits) / len(bits))
        found["residual"].append(moved)
        found["entropy"].append(doubt)
    return found


def limit_between(values: list[list[float]], share: float) -> float:
    """One that `share` of the rows ever go below, and none of them narrowly."""
    least = torch.tensor(values).amin(0).sort().values
    at = int(share * len(least))
    return float(least[at - 1] + least[at]) / 2


def check(halt: str, model, backend: str = "eager") -> None:
    batch = make_batch()
    values = measured(model, batch)[halt]
    limit = limit_between(values, 0.7)
    ends = [
        next((s + 1 for s in range(STEPS) if values[s][r] < limit), STEPS) for r in range(BATCH)
    ]
    halted = [any(values[s][r] < limit for s in range(STEPS)) for r in range(BATCH)]
    model.backend = backend
    counted = CountRows(model)
    found = recurx.solve(model, batch, STEPS, halt, halt_below=limit)
    assert found.steps.tolist() == ends and found.halted.tolist() == halted
    assert len(set(ends)) >= 3, "the test needs rows that differ"
    assert sum(counted.rows) == sum(ends)  # ended rows are not computed again
    last = torch.tensor([values[end - 1][row] for row, end in enumerate(ends)])
    if halt == "residual":
        torch.testing.assert_close(found.residual, last, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("halt", ["residual", "entropy"])
@pytest.mark.parametrize("variant", ["trm", "single_z"])
def test_rows_end_where_a_slow_loop_ends_them(halt: str, variant: str, backend: str) -> None:
    check(halt, make_model(variant=variant), backend)


BUGS = {
    "sums, not means": lambda before, after: MOVED(before, after) * before.shape[1],
    "not relative": lambda before, after: (after - before).norm(dim=-1).mean(-1),
    "of all tokens at once": lambda before, after: (
        (after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
    ),
    "squared": lambda before, after: MOVED(before, after) ** 2,
}
MOVED = halting_loop._moved


@pytest.mark.parametrize("bug", BUGS)
def test_planted_residuals_are_found(bug: str, monkeypatch) -> None:
    monkeypatch.setattr(halting_loop, "_moved", BUGS[bug])
    with pytest.raises(AssertionError):
        check("residual", make_model())


def test_noise_is_no_movement() -> None:
    """A residual compares what two steps gave, whatever noise is added between them."""
    model, batch, entered = make_model(), make_batch(4), []
    first = recurx.solve(model, batch, 1, halt=None, sigma=0.5, seed=2, select="residual")
    call = model.inner.forward
    model.inner.register_forward_pre_hook(lambda module, args: entered.append(args[0]["z_H"]))
    again = recurx.solve(model, batch, 1, halt=None, sigma=0.5, seed=2, select="residual")
    start = model.inner.initial_states(4)["z_H"]
    after = call(dict(z_L=model.inner.initial_states(4)["z_L"], z_H=entered[0]), batch)[0]["z_H"]
    assert torch.equal(first.residual, again.residual)
    torch.testing.assert_close(again.residual, MOVED(start, after))
    assert (again.residual - MOVED(entered[0], after)).abs().max() > 1e-3


@pytest.mark.parametrize("cls", [TRM, HRM])
def test_the_most_settled_try_is_picked(cls: type) -> None:
    model, batch, tries = make_model(cls), make_batch(6), 5
    how = dict(max_steps=4, halt=None, rollouts=tries, init="random", seed=1)
    alone = [
        recurx.solve(model, {k: v[n : n + 1] for k, v in batch.items()}, first_sample=n,
                     select="residual", **how) for n in range(6)
    ]  # fmt: skip
    found = recurx.solve(model, batch, select="residual", **how)
    torch.testing.assert_close(found.residual, torch.cat([a.residual for a in alone]))
    rows = {k: v.repeat_interleave(tries, 0) for k, v in batch.items()}
    rules = halting_loop.Rules(4, None, rollouts=tries, init="random", seed=1, select="residual")
    every = halting_loop.refine(model, rows, torch.arange(6 * tries), rules)
    best = every.residual.view(6, tries).argmin(1) + tries * torch.arange(6)
    assert torch.equal(found.predictions, every.predictions[best])
    torch.testing.assert_close(found.residual, every.residual[best])
    torch.testing.assert_close(found.q, every.q[best])
    by_q = recurx.solve(model, batch, select="q", **how)
    assert by_q.residual is None and not torch.equal(by_q.q, found.q)


def test_rows_of_nonsense_come_last() -> None:
    model, batch = make_model(), make_batch(3)
    found = recurx.solve(model, batch, 2, None, rollouts=2, init="random", select="residual")
    nonsense = halting_loop.Answers(
        *(getattr(found, n).repeat_interleave(2, 0) for n in ("predictions", "steps", "q")),
        found.halted.repeat_interleave(2), found.rollout_steps,
        residual=torch.tensor([math.nan, 3.0, 2.0, math.nan, 1.0, 2.0]),
    )  # fmt: skip
    assert pick(nonsense, batch["inputs"], 2, "residual").residual.tolist() == [3.0, 2.0, 1.0]


@pytest.mark.parametrize("rules", [
    {"halt": "residual"}, {"halt": "entropy"}, {"select": "residual", "rollouts": 2, "sigma": 0.1},
], ids=str)  # fmt: skip
def test_engines_that_solve_inside_leave_it_to_the_loop_or_refuse(rules: dict, monkeypatch) -> None:
    said = next(f"{k}='{v}'" for k, v in rules.items())
    with pytest.raises(recurx.BackendUnavailable, match=f"kernel without {said}.*leave"):
        recurx.solve(make_model(), make_batch(2), backend="cuda", **rules)
    monkeypatch.setattr(on_cpu, "_refine", lambda *given: pytest.fail("solved inside the engine"))
    for backend in ENGINES:
        recurx.solve(make_model(), make_batch(3), 2, backend=backend, **rules)


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_a_bad_limit_is_named(value: float) -> None:
    with pytest.raises(recurx.InvalidArgument, match="`halt_below`"):
        recurx.solve(make_model(), make_batch(2), halt="residual", halt_below=value)


@pytest.mark.parametrize("system", ["trm", "hrm"])
def test_official_carries_have_residuals(system: str) -> None:
    loaded = official.load(system)
    model = loaded["model"](official.config(system, halt_max_steps=16)).eval()
    how = dict(max_steps=3, rollouts=3, init="random")
    found = recurx.solve(model, official.batch(), halt="residual", select="residual", **how)
    assert (found.residual > 0).all() and found.steps.tolist() == [3] * len(found)
