"""Which of several tries counts: by q, by votes, or by a function that checks answers."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import recurx
from recurx import tasks
from recurx.commands import main
from recurx.experiments.answering import refinement
from recurx.models import TRM, TRMConfig
from recurx.solving import rollouts
from recurx.solving.halting_loop import Answers, refine
from recurx.solving.options import Rules
from tests.solving.test_solve import make_batch, make_model

STEPS, TRIES = 4, 5


def some_answers() -> Answers:
    """Three tries of each of two samples."""
    predictions = torch.tensor([[1, 1], [2, 2], [2, 2], [5, 5], [6, 6], [7, 7]])
    return Answers(
        predictions=predictions,
        steps=torch.tensor([1, 2, 3, 4, 5, 6]),
        q=torch.tensor([9.0, 1.0, 2.0, -1.0, -3.0, -2.0]),
        halted=torch.tensor([True, False, True, False, False, False]),
        rollout_steps=torch.zeros(6, 1, dtype=torch.int64),
        trace=predictions[None],
    )


def test_selection_by_q_by_vote_and_by_a_check() -> None:
    def pick(select) -> Answers:
        return rollouts.pick(some_answers(), torch.tensor([[3, 0], [4, 0]]), 3, select)

    by_q, by_vote = pick("q"), pick("vote")
    assert by_q.predictions.tolist() == [[1, 1], [5, 5]] and by_q.steps.tolist() == [1, 4]
    assert by_vote.predictions.tolist() == [[2, 2], [5, 5]] and by_vote.steps.tolist() == [3, 4]
    assert by_vote.q.tolist() == [2.0, -1.0] and by_vote.halted.tolist() == [True, False]
    assert by_vote.trace.tolist() == [[[2, 2], [5, 5]]]
    assert by_vote.rollout_steps.tolist() == [[1, 2, 3], [4, 5, 6]]

    checked = pick(lambda inputs, answers: inputs[:, 0] + answers[:, 0] == 5)  # 2 of the first
    assert checked.steps.tolist() == [2, 4]  # the first that passes; of none, the highest q


@pytest.mark.parametrize("select", ["q", "vote", lambda i, a: torch.zeros(len(a)).bool()])
def test_nonsense_is_never_picked_where_there_is_sense(select) -> None:
    """A row of NaN answers token 0, like all rows of NaN: it would win votes, too."""
    found = some_answers()
    found = replace(found, q=torch.tensor([-torch.inf, *[torch.nan] * 5]))
    found.predictions[4:] = 0
    with pytest.warns(RuntimeWarning, match="q is NaN"):
        picked = rollouts.pick(found, torch.zeros(2, 2, dtype=torch.int64), 3, select)
    assert picked.steps.tolist()[0] == 1 and picked.q[0] == -torch.inf and picked.q[1].isnan()
    found = replace(found, q=torch.tensor([torch.nan, -9.0, torch.inf, 1.0, torch.nan, 2.0]))
    with pytest.warns(RuntimeWarning):
        picked = rollouts.pick(found, torch.zeros(2, 2, dtype=torch.int64), 3, select)
    assert picked.q.tolist() == [torch.inf, 2.0]


@pytest.mark.parametrize("select", ["q", "vote", lambda i, a: torch.zeros(len(a)).bool()])
def test_tries_of_nothing_and_of_a_broken_net(select, recwarn) -> None:
    model = make_model()
    empty = {key: value[:0] for key, value in make_batch().items()}
    answers = recurx.solve(model, empty, rollouts=3, sigma=0.1, select=select)
    assert answers.predictions.shape == empty["inputs"].shape and len(answers.q) == 0
    assert answers.rollout_steps.shape == (0, 3) and not recwarn
    model.inner.q_head.weight.data.fill_(torch.nan)
    with pytest.warns(RuntimeWarning, match="hold NaN or inf"):
        recurx.solve(model, make_batch(), max_steps=2, rollouts=3, sigma=0.1, select=select)


def some_pass(inputs: Tensor, answers: Tensor) -> Tensor:
    """About one answer in three, by what it says alone."""
    return (answers.sum(-1) + inputs.sum(-1)) % 3 == 0


@pytest.mark.parametrize("more", [{}, {"first_sample": 7, "fill": recurx.Fill(2, 0.3)}])
def test_tries_in_turn_pick_what_all_at_once_pick(more: dict) -> None:
    """Some samples pass at once, some later, some never; noise and starts are those of the try."""
    model, batch = make_model(), make_batch()
    rules = Rules(
        STEPS, "q", rollouts=TRIES, sigma=0.8, init="random", logits=True, trace=True, **more
    )
    run = functools.partial(refine, model, rules=rules)
    with torch.no_grad():
        at_once = rollouts.at_once(run, batch, TRIES, some_pass)
        in_turn = rollouts.in_turn(run, batch, TRIES, some_pass)
    made = (in_turn.rollout_steps > 0).sum(1)
    passed = some_pass(batch["inputs"], in_turn.predictions)
    assert {1, 2, TRIES} <= set(made.tolist()) and not passed.all()
    assert (made[~passed] == TRIES).all()
    for name in ("predictions", "steps", "halted"):
        assert torch.equal(getattr(in_turn, name), getattr(at_once, name)), name
    longest = len(in_turn.trace)  # a try that was not needed may have had more steps
    assert torch.equal(in_turn.trace, at_once.trace[:longest])
    assert torch.equal(in_turn.trace[-1], at_once.trace[-1])
    for name in ("q", "logits"):  # batches of other sizes round differently
        torch.testing.assert_close(getattr(in_turn, name), getattr(at_once, name))
    not_made = in_turn.rollout_steps == 0
    both = torch.where(not_made, 0, at_once.rollout_steps)
    assert torch.equal(in_turn.rollout_steps, both) and 0 not in in_turn.histogram()


def test_solve_tries_until_the_check_passes() -> None:
    model, batch = make_model(), make_batch()
    seen = []

    def watched(inputs: Tensor, answers: Tensor) -> Tensor:
        seen.append(len(inputs))
        return some_pass(inputs, answers)

    found = recurx.solve(model, batch, STEPS, rollouts=TRIES, sigma=0.8, select=watched)
    assert len(seen) == TRIES and seen == sorted(seen, reverse=True) and seen[0] > seen[-1]
    by_q = recurx.solve(model, batch, STEPS, rollouts=TRIES, sigma=0.8)
    passed = [int(some_pass(batch["inputs"], a.predictions).sum()) for a in (found, by_q)]
    assert passed[0] > passed[1]
    nobody = recurx.solve(
        model, batch, STEPS, rollouts=TRIES, sigma=0.8,
        select=lambda inputs, answers: torch.zeros(len(inputs), dtype=torch.bool),
    )  # fmt: skip
    torch.testing.assert_close(nobody.q, by_q.q)
    assert len(recurx.solve(model, make_batch(0), rollouts=2, select=some_pass)) == 0


@pytest.mark.parametrize(
    ("select", "got"),
    [
        ("rules", "'rules'"),
        (lambda inputs, answers: True, "bool"),
        (lambda inputs, answers: answers == 1, "torch.bool .24, 9."),
        (lambda inputs, answers: answers[:, 0], "torch.int64"),
    ],
)
def test_what_is_no_check_is_refused(select, got: str) -> None:
    with pytest.raises(recurx.InvalidArgument, match=f"solve.*select.*{got}"):
        recurx.solve(make_model(), make_batch(), select=select)


def test_tasks_check_by_their_rules_and_arc_says_why_it_cannot() -> None:
    task = tasks.get("sudoku-4x4")
    examples = tasks.Sampler(task, 0, "held-out").draw_distinct(4)
    inputs, answers = torch.from_numpy(examples.inputs), torch.from_numpy(examples.answers)
    wrong = answers.clone()
    wrong[1, 0] = wrong[1, 1]
    assert task.accepts(inputs, wrong).tolist() == [True, False, True, True]
    arc = tasks.get("arc:limit=1,augmentations=0")
    with pytest.raises(recurx.InvalidArgument, match="only its label tells"):
        arc.accepts(inputs, answers)
    assert task.has_rules and refinement.by_rules({"select": "vote"}, arc) == {"select": "vote"}
    with pytest.raises(recurx.InvalidArgument, match="only labels tell right answers to arc"):
        refinement.by_rules({"select": "rules"}, arc)


def test_the_command_line_and_a_net_may_ask_for_the_rules(tmp_path, capsys) -> None:
    """A random net solves nothing: every try is made, whether the user or the net asks for them."""
    torch.manual_seed(0)
    task, path = tasks.get("sudoku-4x4"), tmp_path / "net.safetensors"
    model = TRM(TRMConfig.tiny(task.vocab_size, task.seq_len, H_cycles=1, L_cycles=1))
    how = {"max_steps": 2, "halt": None, "rollouts": 3, "sigma": 0.5}
    arguments = ["eval", "--checkpoint", str(path), "--count", "8", "--json"]
    steps = []
    for select, said in (("q", ["--select", "rules"]), ("rules", [])):
        recurx.save_checkpoint(path, model, {"task": task.name, "solve": {**how, "select": select}})
        assert main([*arguments, *said]) == 0
        steps.append(json.loads(capsys.readouterr().out.splitlines()[-1])["histogram"])
    assert steps == [{"2": 24}] * 2
    recommended = recurx.load_checkpoint(path).recommended
    assert recommended["select"].__self__ == task and recommended["sigma"] == 0.5
    batch = {"inputs": torch.ones(1, task.seq_len, dtype=torch.int64)}
    assert recurx.solve(model, batch, **recommended).rollout_steps.tolist() == [[2, 2, 2]]
    recurx.save_checkpoint(path, model, {"solve": {"select": "rules"}})
    with pytest.raises(recurx.CheckpointError, match="does not say of which task"):
        _ = recurx.load_checkpoint(path).recommended
