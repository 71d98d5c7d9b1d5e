"""Training: the optimiser, exact resumption, interrupts, honest evaluation."""

from __future__ import annotations

import copy
import json
import os

import numpy as np
import pytest
import torch
from torch import Tensor

import recurx
import recurx.experiments.tasks
from recurx import tasks
from recurx.errors import CheckpointError, InvalidArgument
from recurx.train import AdamATan2, Average, TrainConfig, Trainer, evaluate, preset
from tests import alone

TASK = "sort:length=5,values=4"


def tiny(**changes) -> TrainConfig:
    model = {"hidden_size": 16, "num_heads": 2, "halt_max_steps": 3, "halt_exploration_prob": 0.5}
    values = {"batch_size": 6, "seed": 1, "warmup": 3, **changes}
    values["model"] = {**model, **values.pop("model", {})}
    return preset("tiny-mlp", TASK, **values)


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Every tensor that the next step depends on, flat."""
    flat: dict[str, Tensor] = {}

    def walk(name: str, value: object) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{name}/{key}", item)
        else:
            flat[name] = torch.as_tensor(value)

    walk("", trainer._tensors_to_save())
    return flat


def differing(a: Trainer, b: Trainer) -> list[str]:
    left, right = everything(a), everything(b)
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


# ---- optimiser and average ---------------------------------------------------------------------


def test_adam_atan2_takes_the_published_step() -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 3)
    grads = [torch.randn(7, 3) for _ in range(4)]
    param = torch.nn.Parameter(weight.clone())
    optimizer = AdamATan2([param], lr=0.1, betas=(0.9, 0.95), weight_decay=0.5)
    expected, mean, square = weight.double(), 0.0, 0.0
    for index, grad in enumerate(grads, start=1):
        param.grad = grad.clone()
        optimizer.step()
        mean = 0.9 * mean + 0.1 * grad.double()
        square = 0.95 * square + 0.05 * grad.double() ** 2
        step = torch.atan2(mean / (1 - 0.9**index), (square / (1 - 0.95**index)).sqrt())
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * step
    torch.testing.assert_close(param.detach().double(), expected, rtol=1e-6, atol=1e-6)
    without_decay = expected + 0.1 * 0.5 * weight  # what a forgotten decay would be near
    assert (param - without_decay).abs().max() > 1e-2


def test_adam_atan2_does_not_depend_on_the_scale_of_the_loss_and_takes_lr_zero() -> None:
    steps = []
    for scale in (1.0, 1e-12):
        param = torch.nn.Parameter(torch.ones(4))
        param.grad = scale * torch.tensor([1.0, -2.0, 3.0, 0.0])
        AdamATan2([param], lr=0.1, weight_decay=0.0).step()
        steps.append(param.detach() - 1)
    torch.testing.assert_close(steps[0], steps[1])
    assert steps[0][0] < 0 < steps[0][1] and steps[0][3] == 0
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    AdamATan2([param], lr=0).step()
    assert (param == 1).all()
    with pytest.raises(InvalidArgument, match="lr"):
        AdamATan2([param], lr=-1)
    with pytest.raises(InvalidArgument, match="betas"):
        AdamATan2([param], betas=(0.9, 1.0))


def test_average_follows_the_weights() -> None:
    model = torch.nn.Linear(2, 2)
    average = Average(model, decay=0.5)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    average.update(model)
    torch.testing.assert_close(average.weights["weight"], start + 0.9)  # decay 1 / 10 at first
    for _ in range(40):
        average.update(model)
    torch.testing.assert_close(average.weights["weight"], model.weight.detach())
    average.decay = 1.0 - 1e-9
    model.weight.data.zero_()
    average.copy_to(model)
    torch.testing.assert_close(model.weight.detach(), start + 1)


# ---- runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["trm", "hrm", "hier6"])
def test_the_carry_between_steps_is_that_of_a_plain_loop(variant: str) -> None:
    """Each state under its own name. Learning tells nothing of it: nets learn from swapped ones."""
    model = {"variant": variant, "H_layers": int(variant == "hrm"), "halt_max_steps": 9}
    run = Trainer(tiny(model={**model, "no_ACT_continue": variant != "hrm"}), backend="eager")
    plain = None
    for _ in range(3):
        twin = copy.deepcopy(run.model)
        batch = {key: values[:6].clone() for key, values in run.queue.ring.items()}
        plain, _ = twin(plain or twin.initial_carry(batch), batch)
        run.train_step()
        assert run.carry.inner_carry.keys() == plain.inner_carry.keys()
        for name, state in run.carry.inner_carry.items():
            torch.testing.assert_close(state, plain.inner_carry[name], msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("optimizer", ["adam-atan2", "adamw"])
@pytest.mark.parametrize("variant", ["trm", "hrm"])
def test_interrupted_and_resumed_is_the_undisturbed_run_to_the_bit(
    tmp_path, optimizer: str, variant: str
) -> None:
    model = {"variant": variant, "H_layers": int(variant == "hrm")}
    model |= {"puzzle_emb_ndim": 16, "no_ACT_continue": variant != "hrm"}
    config = tiny(optimizer=optimizer, model=model)
    whole = Trainer(config)
    for _ in range(11):
        whole.train_step()
    first = Trainer(config, tmp_path)
    assert first.run(steps=4) == "steps"
    torch.manual_seed(99)  # what else the process does must not matter
    second = Trainer.resume(tmp_path)
    assert second.step == 4 and differing(second, first) == []
    second.run(steps=11, save_every=3)
    assert differing(second, whole) == []
    third = Trainer.resume(tmp_path)
    assert third.config == config and differing(third, whole) == []
    assert second.data.state_dict() == whole.data.state_dict()


@pytest.mark.parametrize(
    "forgotten",
    ["optimizer", "exploration", "average", "updates", "carry", "sampler", "queue", "count"],
)
def test_the_comparison_notices_anything_that_is_not_restored(
    tmp_path, forgotten: str, monkeypatch
) -> None:
    """Planted bugs: leave out one part of the state, and the bits must differ."""
    config = tiny(model={"halt_max_steps": 5})
    whole = Trainer(config)
    for _ in range(9):
        whole.train_step()
    Trainer(config, tmp_path).run(steps=4)
    fresh = Trainer(config)
    if forgotten == "sampler":
        monkeypatch.setattr(tasks.Sampler, "load_state_dict", lambda self, state: None)
    resumed = Trainer.resume(tmp_path)
    if forgotten == "optimizer":
        resumed.optimizer.state.clear()
    elif forgotten == "exploration":
        resumed.exploration.state.copy_(fresh.exploration.state)
    elif forgotten == "average":
        for name, weight in resumed.average.weights.items():
            weight.copy_(resumed.model.get_parameter(name).detach())
    elif forgotten == "updates":
        resumed.average.updates = 0
    elif forgotten == "carry":
        resumed.carry.steps.zero_()
    elif forgotten == "queue":
        resumed.queue.load({})
    elif forgotten == "count":  # of the warm-up
        resumed.one_step.count.zero_()
    resumed.run(steps=9)
    assert differing(resumed, whole)


def test_a_run_starts_from_the_weights_of_another(tmp_path) -> None:
    first = Trainer(tiny(), tmp_path / "first")
    first.run(steps=4)
    began = tmp_path / "first" / "model.safetensors"
    second = Trainer(tiny(seed=7, model={"L_cycles": 3}), tmp_path / "second")
    second.start_from(began)
    saved = recurx.load_checkpoint(began)
    assert all(torch.equal(saved[name], w) for name, w in second.model.state_dict().items())
    assert all(torch.equal(saved[name], w) for name, w in second.average.weights.items())
    assert len(second.config.started_from) == 64
    second.run(steps=2)
    began.unlink()  # a resumed run needs it no more
    assert Trainer.resume(tmp_path / "second").config == second.config
    with pytest.raises(InvalidArgument, match="a run without steps"):
        second.start_from(tmp_path / "second" / "model.safetensors")


def test_a_run_does_not_start_from_weights_that_do_not_fit(tmp_path) -> None:
    first = Trainer(tiny(), tmp_path / "first")
    first.save()
    wider = Trainer(tiny(model={"hidden_size": 32}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        wider.start_from(tmp_path / "first" / "model.safetensors")
    with pytest.raises(FileNotFoundError):
        wider.start_from(tmp_path / "nowhere.safetensors")


def test_seeds_decide() -> None:
    runs = [Trainer(tiny(seed=seed)) for seed in (1, 1, 2)]
    for trainer in runs:
        for _ in range(3):
            trainer.train_step()
    assert differing(runs[0], runs[1]) == []
    assert differing(runs[0], runs[2])


def test_training_never_sees_a_held_out_example(monkeypatch) -> None:
    trainer = Trainer(tiny())
    seen: list[np.ndarray] = []
    original = trainer.data.sampler.draw

    def draw(count: int) -> tasks.Examples:
        seen.append((drawn := original(count)).inputs)
        return drawn

    monkeypatch.setattr(trainer.data.sampler, "draw", draw)
    for _ in range(12):
        trainer.train_step()
    inputs = np.concatenate(seen)
    assert len(inputs) > 6  # samples were replaced
    assert not trainer.task.held_out(tasks.Examples(inputs, inputs)).any()
    assert trainer.task.held_out(trainer.held_out(20)).all()


def test_only_halted_slots_take_fresh_samples() -> None:
    trainer = Trainer(tiny())
    trainer.train_step()
    for _ in range(6):
        before, halted = trainer.carry.current_data["inputs"].clone(), trainer.carry.halted.clone()
        trainer.train_step()
        after = trainer.carry.current_data["inputs"]
        assert torch.equal(before[~halted], after[~halted])
        assert (before[halted] != after[halted]).any() or not halted.any()


def test_interrupts() -> None:
    alone.passes("train/interrupted.py")


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch) -> None:
    trainer = Trainer(tiny(), tmp_path)
    trainer.run(steps=2)
    trainer.train_step()
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(OSError, match="disk is full"):
        trainer.save()
    monkeypatch.undo()
    assert Trainer.resume(tmp_path).step == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "state.safetensors"]


def test_time_budget_callback_and_metrics(tmp_path) -> None:
    trainer = Trainer(tiny(), tmp_path)
    assert trainer.run(time_budget=0) == "time" and trainer.step == 0
    assert trainer.run(on_step=lambda progress: progress.step == 2) == "stopped"
    trainer.log({"loss": 1.0})
    trainer.train_step()
    trainer.log({"loss": 2.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')  # cut short by a kill
    Trainer.resume(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 2, "loss": 1.0}]


def test_nothing_to_resume_and_damaged_state(tmp_path) -> None:
    with pytest.raises(InvalidArgument, match="nothing to resume"):
        Trainer.resume(tmp_path)
    (tmp_path / "state.safetensors").write_bytes(b"no state at all")
    with pytest.raises(CheckpointError, match="damaged"):
        Trainer.resume(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "huge"}, "preset of trm-att"),
        ({"task": "chess"}, "one of sudoku"),
        ({"epochs": 3}, "epochs"),
        ({"optimizer": "sgd"}, "adamw"),
        ({"batch_size": 0}, "batch_size"),
        ({"ema": 1.0}, "ema"),
        ({"lr": -1.0}, "lr"),
        ({"warmup": -1}, "warmup"),
        ({"model": {"hidden": 3}}, "hidden"),
    ],
)
def test_bad_configurations_are_refused(arguments: dict, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        preset(**{"name": "tiny-mlp", "task": TASK, **arguments})


@pytest.mark.parametrize("name", ["trm-att", "trm-mlp", "single-z", "hier6", "hrm"])
def test_published_presets_fit_the_tasks(name: str) -> None:
    config = preset(name, "sudoku").model_config(tasks.get("sudoku"))
    assert (config.hidden_size, config.vocab_size, config.seq_len) == (512, 11, 81)
    assert config.tokens == (82 if name == "hrm" else 97)
    assert TrainConfig.from_json(preset(name, "sudoku").to_json()) == preset(name, "sudoku")


# ---- evaluation --------------------------------------------------------------------------------


def test_evaluate_checks_by_the_rules_and_counts_steps() -> None:
    trainer = Trainer(tiny())
    examples = trainer.held_out(10)
    model = trainer.averaged()
    report = evaluate(model, trainer.task, examples, max_steps=4, halt=None, batch_size=3)
    batch = {"inputs": torch.from_numpy(examples.inputs)}
    answers = recurx.solve(model, batch, max_steps=4, halt=None, trace=True)
    right = trainer.task.check(examples.inputs, answers.predictions.numpy())
    assert report.exact == right.mean() and report.curve[-1] == report.exact
    assert report.cells == (answers.predictions.numpy() == examples.answers).mean()
    assert (report.count, report.steps_mean, report.histogram) == (10, 4.0, {4: 10})
    assert len(report.curve) == 4 and report.seconds > 0

    wrong = tasks.Examples(examples.inputs, np.zeros_like(examples.answers))
    blind = evaluate(model, trainer.task, wrong, known=np.zeros(10, bool), max_steps=4, halt=None)
    assert blind.exact == report.exact and blind.cells is None  # labels are not needed


def test_it_learns_to_sort() -> None:
    """Small enough for seconds; a loop that does not learn stays near zero."""
    trainer = Trainer(tiny(seed=0, batch_size=32, ema=0.9, model={"hidden_size": 32}))
    examples = trainer.held_out(64)
    before = evaluate(trainer.averaged(), trainer.task, examples, max_steps=3).exact
    trainer.run(steps=250)
    after = evaluate(trainer.averaged(), trainer.task, examples, max_steps=3).exact
    assert before < 0.1 and after > 0.6


def test_a_small_halting_weight_teaches_the_halting_head_alike() -> None:
    """AdamATan2 does not see the scale of a gradient; at 0 the head has none and stays."""

    def moved(weight: float) -> float:
        trainer = Trainer(tiny(halt_weight=weight, weight_decay=0.0))
        head = trainer.model.inner.q_head.bias
        before = head.detach().clone()
        for _ in range(5):
            trainer.train_step()
        return float((head.detach() - before).abs().max())

    assert moved(0.0) == 0
    assert moved(0.01) == pytest.approx(moved(0.5), rel=0.1)
    with pytest.raises(InvalidArgument, match="halt_weight"):
        tiny(halt_weight=-1.0)
