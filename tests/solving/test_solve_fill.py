"""recurx.solve(fill=): blanks filled in the order of confidence."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from torch import Tensor

import recurx
import recurx.experiments.tasks
from recurx.cli import options
from recurx.commands import main
from recurx.experiments.answering.refinement import Refining, arguments_of_solve
from recurx.models import TRM, TRMConfig
from tests.solving.test_solve import CountRows, fixed_loop, make_batch, make_model
from tests.test_shipped import EASY, net, puzzle_file  # noqa: F401 (a fixture)

BLANK, STEPS = 1, 40


def slow(model, question: Tensor, above: float, every: int, budget: int) -> dict:
    """One row [T]: run afresh, fill, run afresh."""
    steps, checked = 0, False
    while steps < budget and not checked:
        checked = not bool((question == BLANK).any())
        data = {"inputs": question[None], "puzzle_identifiers": torch.zeros(1, dtype=torch.int32)}
        run = 1 if checked else min(every, budget - steps)
        logits = fixed_loop(model, data, run)[-1]["logits"][0]
        steps += run
        answer = torch.where(question == BLANK, logits.argmax(-1), question)
        if not checked and run == every:
            likely = logits.softmax(-1).amax(-1)
            likely[question != BLANK] = -1
            now = likely > above
            now[likely.argmax()] = True
            question = torch.where(now, answer, question)
    return {"answer": answer, "steps": steps, "ended": checked}


def no_blank_answers(model: TRM) -> TRM:
    with torch.no_grad():  # like a trained net, it never answers with a blank
        model.inner.lm_head.weight[BLANK] = -3 * model.inner.lm_head.weight[2]
        model.inner.lm_head.weight[BLANK + 1] *= 3
    return model


@pytest.mark.parametrize(("above", "every"), [(1.0, 1), (0.5, 1), (0.5, 3)])
def test_it_is_the_slow_loop(above: float, every: int) -> None:
    model, batch = no_blank_answers(make_model()), make_batch()
    batch["inputs"][0] = BLANK
    batch["inputs"][1] = 3  # nothing to fill
    counted = CountRows(model)
    fill = recurx.Fill(BLANK, above, every)
    found = recurx.solve(model, batch, STEPS, None, fill=fill, trace=True)
    assert sum(counted.rows) == int(found.steps.sum())  # ended rows are not computed again
    expected = [slow(model, row, above, every, STEPS) for row in batch["inputs"]]
    assert found.steps.tolist() == [e["steps"] for e in expected]
    assert found.halted.tolist() == [e["ended"] for e in expected]
    assert torch.equal(found.predictions, torch.stack([e["answer"] for e in expected]))
    assert found.steps[1] == 1 and int(found.steps.max()) > every
    if above == 1.0:  # one blank a step, and one step to judge the whole
        blanks = (batch["inputs"] == BLANK).sum(-1)
        refilled = found.halted  # a blank may be answered with a blank, and is asked again
        assert (found.steps[refilled] >= blanks[refilled] + 1).all() and refilled.any()
    givens = batch["inputs"] != BLANK
    assert (found.trace[:, givens] == batch["inputs"][givens]).all()  # what is given stays


def test_rollouts_halting_and_the_budget_hold_beside_it() -> None:
    model, batch = make_model(), make_batch()
    fill = {"blank": BLANK, "above": 1.0}
    short = recurx.solve(model, batch, 2, None, fill=fill)
    assert int(short.steps.max()) == 2 and not bool(short.halted.all())
    early = recurx.solve(model, batch, STEPS, "q", halt_above=-1e9, fill=fill)
    assert early.steps.tolist() == [1] * len(early)
    several = recurx.solve(
        model, batch, STEPS, None, rollouts=3, init="random", select="vote", fill=fill
    )
    assert several.rollout_steps.shape == (len(batch["inputs"]), 3)
    first = recurx.solve(model, batch, STEPS, None, fill=fill)
    assert torch.equal(several.rollout_steps[:, 0], first.steps)  # it starts as a single one does


@pytest.mark.parametrize(
    ("fill", "says"),
    [
        ({"blanks": 1}, "these fields as a mapping"),
        (0.9, "these fields as a mapping"),
        ({"blank": 1.5}, "an int `blank`"),
        ({"blank": 1, "steps": 0}, "`steps` >= 1"),
        ({"blank": 1, "above": 2.0}, "a probability"),
    ],
)
def test_bad_settings_are_refused(fill, says: str) -> None:
    with pytest.raises(recurx.InvalidArgument, match=says):
        recurx.solve(make_model(), make_batch(), fill=fill)


def test_answers_of_another_length_are_not_filled_in() -> None:
    model = make_model()
    model.inner.lm_head.register_forward_hook(lambda module, args, out: out[:, 1:])
    with pytest.raises(recurx.InvalidArgument, match="8 tokens for 9"):
        recurx.solve(model, make_batch(), fill=recurx.Fill(BLANK))


def test_the_command_line_fills(net, tmp_path, capsys) -> None:  # noqa: F811
    file = puzzle_file(tmp_path, f"{EASY}\n")
    told = {}
    for name, said in {"all at once": [], "filled": ["--fill", "1", "--halt", "none"]}.items():
        assert main(["eval", "--puzzles", file, *said, "--json"]) == 0
        told[name] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["all at once"]["steps_mean"] <= 3 and told["filled"]["steps_mean"] > 50
    with pytest.raises(SystemExit):
        main(["eval", "--puzzles", file, "--fill", "2"])
    assert "a probability or none" in capsys.readouterr().err


def test_a_net_may_recommend_filling_and_the_user_may_decline(tmp_path, capsys) -> None:
    torch.manual_seed(0)
    model = TRM(TRMConfig.tiny(11, 81, hidden_size=16, num_heads=2, H_cycles=1, L_cycles=1))
    path, file = tmp_path / "net.safetensors", puzzle_file(tmp_path, f"{EASY}\n")
    how = {"max_steps": 5, "halt": None, "fill": {"blank": 1, "above": 0.0}}
    recurx.save_checkpoint(path, model, {"task": "sudoku", "solve": how})
    arguments = ["eval", "--puzzles", file, "--checkpoint", str(path), "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps_mean"] <= 5
    assert main([*arguments, "--fill", "none"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps_mean"] == 5


def test_the_user_changes_only_what_is_said_of_a_recommended_filling() -> None:
    task, how = recurx.tasks.get("sudoku"), {"max_steps": 64, "fill": {"blank": 1, "above": 0.5}}
    parser = argparse.ArgumentParser()
    options.add(parser, Refining)

    def asked(*words: str, recommended: dict | None = None) -> tuple:
        said = options.read(parser.parse_args(words), Refining).how
        values = arguments_of_solve(said, recommended, task)
        return values.get("fill"), values["max_steps"]

    says = how | {"fill": how["fill"] | {"steps": 4}}
    assert asked(recommended=says) == asked("--fill", recommended=says) == (says["fill"], 64)
    assert asked("--fill", "0.9", recommended=says) == ({**says["fill"], "above": 0.9}, 64)
    assert asked("--fill-every", "2", recommended=says) == ({**says["fill"], "steps": 2}, 64)
    assert asked("--fill", "none", recommended=says) == (None, 64)
    assert asked() == (None, 16) and asked("--fill") == ({"blank": 1}, 82)
    assert asked("--fill", "0.9", "--fill-every", "3") == (
        {"blank": 1, "above": 0.9, "steps": 3}, 244,
    )  # fmt: skip
    assert asked("--fill", "--max-steps", "9") == ({"blank": 1}, 9)
    with pytest.raises(recurx.InvalidArgument, match="--fill-every: nothing is filled"):
        asked("--fill-every", "2")


def test_what_has_no_blanks_is_not_filled(tmp_path, capsys) -> None:
    task = recurx.tasks.get("sort:length=4,values=4")
    model = TRM(TRMConfig.tiny(task.vocab_size, task.seq_len, H_cycles=1, L_cycles=1))
    path = tmp_path / "sort.safetensors"
    recurx.save_checkpoint(path, model, {"task": "sort:length=4,values=4"})
    assert main(["eval", "--checkpoint", str(path), "--fill"]) == 2
    assert "have no blanks" in capsys.readouterr().err
