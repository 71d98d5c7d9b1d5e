"""recurx.solve(search=): answers that the rules accept, or the right reason why there is none.

The net is a stub at the seam `search.search(ask, ...)`, so that it may be as wrong as one likes;
the yardstick is a classical solver that counts the answers of every question.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

import recurx
from recurx import tasks
from recurx.experiments.tasks.sudoku import solver
from recurx.experiments.tasks.sudoku.layout import to_boards
from recurx.models import TRM, TRMConfig
from recurx.solving import halting_loop, on_cuda, search
from recurx.solving.halting_loop import Answers
from recurx.solving.options import Rules, Search

TASK = tasks.get("sudoku-4x4")
RULES = Rules(sigma=0.5, seed=3)
BLANK, DIGITS = 1, (2, 3, 4, 5)


def questions(count: int, seed: int = 0) -> Tensor:
    """Puzzles with one answer, with several, with none that clash, and with none that do not."""
    rng = np.random.default_rng(seed)
    inputs = TASK.generate(rng, count).inputs
    for row in range(count):
        kind, blanks = row % 4, rng.permutation(np.flatnonzero(inputs[row] == BLANK))
        if kind == 1:  # a clue less
            inputs[row, rng.choice(np.flatnonzero(inputs[row] != BLANK))] = BLANK
        elif kind == 2:  # two equal clues in a row
            inputs[row, :2] = 3
        elif kind == 3:  # a wrong clue, which clashes with none of the others
            for cell in blanks:
                left = TASK.possible(torch.from_numpy(inputs[row : row + 1]))[0, cell]
                answer = solver.solve(TASK.layout, to_boards(inputs[row])).boards[0, cell] + 1
                wrong = [d for d in DIGITS if d != answer and not _clashes(inputs[row], cell, d)]
                if wrong and left.any():
                    inputs[row, cell] = rng.choice(wrong)
                    break
    return torch.from_numpy(inputs)


def _clashes(tokens: np.ndarray, cell: int, token: int) -> bool:
    neighbours = TASK.grid.neighbours[cell]
    return bool((tokens[neighbours] == token).any())


def truth(inputs: Tensor) -> list[int]:
    """How many answers each question has, up to 2."""
    return solver.solve(TASK.layout, to_boards(inputs.numpy())).count.tolist()


def guessing(share: float = 0.0):
    """A net whose every cell is right with this probability, where there is an answer; else it
    guesses, by a stream that follows from seed, sample and try alone."""

    def ask(data, samples: Tensor, rules: Rules) -> Answers:
        boards, rows = data["inputs"], []
        known = solver.solve(TASK.layout, to_boards(boards.numpy())).boards + 1
        for board, number, answer in zip(boards, samples.tolist(), known, strict=True):
            for try_ in range(rules.rollouts):
                rng = np.random.default_rng([rules.seed, number + rules.first_sample, try_])
                said = rng.choice(DIGITS, len(board))
                if (answer > 1).all():
                    said = np.where(rng.random(len(board)) < share, answer, said)
                rows.append(said)
        n = len(rows)
        return Answers(
            torch.from_numpy(np.array(rows)), torch.full((n,), 2), torch.zeros(n),
            torch.ones(n, dtype=torch.bool), torch.full((n, 1), 2),
        )  # fmt: skip

    return ask


def stubborn(data, samples: Tensor, rules: Rules) -> Answers:
    """Always the same wrong thing, so that all tries agree on it."""
    found = guessing()(data, samples, rules)
    return dataclasses.replace(found, predictions=torch.full_like(found.predictions, 2))


def run(ask, inputs: Tensor, rules: Rules = RULES, **how) -> Answers:
    return search.search(ask, {"inputs": inputs}, rules, Search(TASK, **how))


@pytest.mark.parametrize("ask", [guessing(0.9), guessing(0.5), guessing(), stubborn])
@pytest.mark.parametrize("forced", [False, True])
def test_whatever_the_net_says_no_wrong_answer_is_taken(ask, forced: bool) -> None:
    inputs = questions(80)
    counts = truth(inputs)
    assert set(counts) == {0, 1, 2}
    found = run(ask, inputs, unique=True, budget=300, starts=3, forced=forced)
    named = {0: "contradictory", 1: "solved", 2: "ambiguous"}
    # Complete, too: with budget enough the rules' branches end in the answer, or in a proof.
    assert found.verdicts == tuple(named[count] for count in counts)
    solved = torch.tensor(counts) == 1
    assert TASK.accepts(inputs[solved], found.predictions[solved]).all()
    assert (found.predictions[~solved] == 0).all()  # padding is no answer


def test_without_unique_branches_alone_refute_or_answer() -> None:
    inputs = questions(80, seed=1)
    found = run(stubborn, inputs, budget=2000, starts=2)
    for count, verdict, given, answer in zip(
        truth(inputs), found.verdicts, inputs, found.predictions, strict=True
    ):
        assert verdict == ("solved" if count else "contradictory")
        assert bool(TASK.accepts(given[None], answer[None])) == bool(count)


def test_a_small_budget_abstains() -> None:
    inputs = questions(80, seed=2)
    found = run(guessing(), inputs, budget=1)
    told = Counter(zip(truth(inputs), found.verdicts, strict=True))
    assert told[1, "budget"] == 20 and told[2, "budget"] == 20 and not told[1, "solved"]
    assert set(found.rollout_steps.sum(1).tolist()) == {0, 2}  # clashes cost no step
    undecided = run(guessing(1.0), inputs, unique=True, positions=1, budget=1)
    hard = solver.solve(TASK.layout, to_boards(inputs.numpy()), most=1)
    for complete, verdict in zip(hard.complete, undecided.verdicts, strict=True):
        assert complete or verdict == "budget"  # what is not proved is not answered


def test_planted_bugs_are_seen(monkeypatch) -> None:
    never_twice = test_whatever_the_net_says_no_wrong_answer_is_taken
    with monkeypatch.context() as planted:  # no second answer is looked for
        planted.setattr(search, "_judge_questions", lambda *a: None)
        with pytest.raises(AssertionError):
            never_twice(guessing(0.9), forced=False)
    with monkeypatch.context() as planted:  # cells are filled, and no branch says that they may not
        grow = search._grow
        planted.setattr(search, "_grow", lambda *a, branch: grow(*a, branch=False))
        with pytest.raises(AssertionError):
            test_without_unique_branches_alone_refute_or_answer()
    with monkeypatch.context() as planted:  # a filled cell counts as given, a given one does not
        answer = torch.from_numpy(TASK.generate(np.random.default_rng(9), 1).answers)
        planted.setattr(search, "_tries", lambda p, b, h, r: answer.expand(len(b), r, -1).clone())
        judge = search._judge
        planted.setattr(search, "_judge", lambda h, i, t: judge(h, torch.full_like(i, BLANK), t))
        with pytest.raises(AssertionError):
            never_twice(guessing(0.9), forced=False)


def test_a_sample_is_searched_alike_in_any_batch() -> None:
    inputs = questions(24, seed=4)
    whole = run(guessing(0.7), inputs, budget=40, starts=3)
    for first in range(0, 24, 5):
        rules = dataclasses.replace(RULES, first_sample=first)
        part = run(guessing(0.7), inputs[first : first + 5], rules, budget=40, starts=3)
        chosen = slice(first, first + 5)
        assert part.verdicts == whole.verdicts[chosen]
        assert torch.equal(part.predictions, whole.predictions[chosen])
        assert torch.equal(part.rollout_steps, whole.rollout_steps[chosen])


def test_agreed_cells_are_filled_and_the_others_branched() -> None:
    """The second round's tries agree on all cells but one; the third is asked with those filled."""
    examples = TASK.generate(np.random.default_rng(5), 1)
    inputs, answer = torch.from_numpy(examples.inputs), torch.from_numpy(examples.answers)[0]
    open_cell = int((inputs[0] == BLANK).nonzero()[0, 0])
    seen = []

    def ask(data, samples, rules):
        seen.append(data["inputs"][0])
        found = guessing()(data, samples, rules)
        said = answer.expand(rules.rollouts, -1).clone()
        said[:, open_cell] = 2 + (answer[open_cell] - 1 + torch.arange(rules.rollouts) % 2) % 4
        return dataclasses.replace(found, predictions=said)

    run(ask, inputs, budget=3, starts=2)
    assert torch.equal(seen[0], inputs[0]) and torch.equal(seen[1], inputs[0])
    filled = seen[2] != inputs[0]
    # Only that cell is left, unless the rules had filled the board and no net was asked.
    assert len(seen) == 3 and int(filled.sum()) == int((inputs[0] == BLANK).sum()) - 1
    assert torch.equal(seen[2][filled], answer[filled])


# ---- through recurx.solve ------------------------------------------------------------------------


def tiny_model(backend: str = "auto") -> TRM:
    torch.manual_seed(0)
    config = TRMConfig.tiny(6, 16, hidden_size=32, num_heads=2, H_cycles=1, L_cycles=1)
    model = TRM(config, backend=backend).eval()
    with torch.no_grad():
        model.inner.q_head.weight.normal_(std=0.3)
    return model


HOW = {"max_steps": 3, "halt": None, "init": "random"}


def test_engines_that_solve_inside_need_no_loop(monkeypatch) -> None:
    from recurx import backends

    if backends.get("cpu").why_unavailable():
        pytest.skip("no CPU engine")
    batch = {"inputs": questions(16, seed=6)}
    how = Search(TASK, starts=2, budget=6)
    looped = recurx.solve(tiny_model("eager"), batch, search=how, trace=True, **HOW)
    model = tiny_model("cpu")

    def no_loop(*arguments, **keywords):
        raise AssertionError("the loop on the host ran")

    monkeypatch.setattr(recurx.solving.solve, "refine", no_loop)
    inside = recurx.solve(model, batch, search=how, trace=True, **HOW)
    assert inside.verdicts == looped.verdicts and len(set(inside.verdicts)) > 1
    assert torch.equal(inside.rollout_steps, looped.rollout_steps)
    assert torch.equal(inside.trace[-1][inside.predictions > 0],
                       inside.predictions[inside.predictions > 0])  # fmt: skip


def test_the_cuda_kernel_is_asked_for_all_tries_of_all_boards(monkeypatch) -> None:
    asked = []

    def refine(model, batch, rules):
        asked.append((len(batch["inputs"]), rules.rollouts, rules.sigma, rules.first_sample))
        rows = {k: v.repeat_interleave(rules.rollouts, 0) for k, v in batch.items()}
        return halting_loop.refine(model, rows, torch.arange(len(rows["inputs"])), rules)

    monkeypatch.setattr(on_cuda, "refine", refine)
    batch = {"inputs": questions(8, seed=7)}
    how = Search(TASK, starts=4, budget=3)
    found = recurx.solve(tiny_model("eager"), batch, 2, None, sigma=0.5, search=how, backend="cuda")
    assert asked[0][1:] == (1, 0.0, 0) and asked[1][1:] == (4, 0.5, 0)
    assert len(found.verdicts) == 8


def test_tasks_without_blanks_are_tried_again() -> None:
    task = tasks.get("maze:size=6")
    rng = np.random.default_rng(0)
    inputs = torch.from_numpy(task.generate(rng, 4).inputs)
    torch.manual_seed(1)
    model = TRM(TRMConfig.tiny(task.vocab_size, task.seq_len, hidden_size=32, num_heads=2))
    found = recurx.solve(model, {"inputs": inputs}, search=Search(task, budget=3, starts=2), **HOW)
    assert found.verdicts == ("budget",) * 4 and (found.rollout_steps[:, :5] > 0).all()
    none = recurx.solve(
        tiny_model(), {"inputs": torch.zeros(0, 16, dtype=torch.int64)}, search=Search(TASK), **HOW
    )
    assert none.verdicts == () and len(none) == 0


@pytest.mark.parametrize(
    ("how", "more", "says"),
    [
        ({"starts": 1}, {}, "search.starts`: expected ints of at least"),
        ({"budget": 0}, {}, "search.budget"),
        ({"pin": 0}, {}, "search.pin"),
        ({"rules": object()}, {}, "one without accepts, blank, possible, count"),
        ({"rules": tasks.get("maze:size=6"), "unique": True}, {}, "without an exact solver"),
        ({}, {"init": "learned"}, "tries that differ"),
        ({}, {"logits": True}, "False with `search`"),
    ],
)
def test_bad_settings_are_refused(how: dict, more: dict, says: str) -> None:
    batch = {"inputs": torch.ones(1, 16, dtype=torch.int64)}
    with pytest.raises(recurx.InvalidArgument, match=says):
        recurx.solve(
            tiny_model(), batch, search=Search(**{"rules": TASK, **how}), **{**HOW, **more}
        )
    with pytest.raises(recurx.InvalidArgument, match=r"recurx\.Search"):
        recurx.solve(tiny_model(), batch, search=True, **HOW)
