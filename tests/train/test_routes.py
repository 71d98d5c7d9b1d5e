"""A resumed run takes the backends that its state names, whatever is known where it goes on."""

from __future__ import annotations

import pytest

from recurx import trials, verdicts
from recurx.train import Trainer, state
from recurx.train.run_folder import STATE_FILE
from tests.train.simulated import on
from tests.train.test_train import differing, tiny


@pytest.fixture(autouse=True)
def nothing_known():
    trials.forget()
    yield
    trials.forget()


def config():
    return tiny(model={"hidden_size": 32, "H_cycles": 2})


def rewrite(folder, **changes) -> dict:
    """The values of a state file, after changing or (None) dropping some."""
    values, tensors = state.read(folder / STATE_FILE)
    values = {k: v for k, v in {**values, **changes}.items() if v is not None}
    state.write(folder / STATE_FILE, values, tensors)
    return values


def prefer(monkeypatch, tmp_path, name: str) -> None:
    """Every measurement finds this backend faster."""
    monkeypatch.setenv("RECURX_AUTOTUNE", "1")
    monkeypatch.setenv("RECURX_CACHE", str(tmp_path / "cache"))
    seconds = {"cpu": 1.0, "eager": 1.0, name: 0.5}
    verdict = verdicts.Verdict(name, tuple(seconds.items()), 1)
    monkeypatch.setattr(trials, "_race", lambda *given: verdict)
    trials.forget()


@pytest.mark.parametrize("first, later", [("cpu", "eager"), ("eager", "cpu")])
def test_a_resumed_run_takes_its_own_routes(native, monkeypatch, tmp_path, first, later) -> None:
    prefer(monkeypatch, tmp_path / "a", first)
    whole = Trainer(config())
    for _ in range(5):
        whole.train_step()
    run = Trainer(config(), tmp_path)
    run.run(steps=3)
    stored = rewrite(tmp_path)["routes"]
    assert {key.split()[0]: entry["chosen"] for key, entry in stored.items()} == {
        "calls": first, "window": first,
    }  # fmt: skip
    prefer(monkeypatch, tmp_path / "b", later)  # another machine, another cache
    with on("auto") as ran:
        fresh = Trainer(config())
        fresh.train_step()
        ran.clear()  # that step's comparison
        fresh.train_step()
        assert bool(ran) == (later == "cpu")
        ran.clear()
        resumed = Trainer.resume(tmp_path)
        resumed.run(steps=5)
        assert bool(ran) == (first == "cpu")
    assert differing(resumed, whole) == []
    assert rewrite(tmp_path)["routes"] == stored


def test_without_measuring_the_choice_of_the_model_is_stored(native, tmp_path) -> None:
    run = Trainer(config(), tmp_path)
    run.save()
    assert state.read(tmp_path / STATE_FILE)[0]["routes"] == {}  # nothing has run
    run.run(steps=1)
    stored = rewrite(tmp_path)["routes"]
    (calls,) = (entry for key, entry in stored.items() if key.startswith("calls"))
    assert calls == {"chosen": "cpu", "seconds": {}, "calls": 0}
    trials.forget()
    assert Trainer.resume(tmp_path).step == 1


def test_states_without_routes_and_with_odd_ones_load(tmp_path) -> None:
    run = Trainer(config(), tmp_path)
    run.run(steps=2)
    for odd in (None, {"nonsense": 1}, {"calls of something": {"chosen": "cuda"}}):
        rewrite(tmp_path, routes=odd)
        assert differing(Trainer.resume(tmp_path), run) == []


def test_an_explicit_backend_stores_none(tmp_path) -> None:
    run = Trainer(config(), tmp_path, backend="eager")
    run.run(steps=1)
    assert rewrite(tmp_path)["routes"] == {}
