"""The last answer as an input of the next supervision step: forward, gradient, solve, files."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import recurx
from recurx.errors import BackendUnavailable, InvalidArgument
from recurx.models import ACTLossHead, ModelConfig
from recurx.models.inner import Inner
from recurx.solving import on_cpu
from recurx.train import Trainer
from tests.models.test_models import CONFIGS, batch, build, set_q
from tests.train.test_train import differing, tiny

KINDS = ("softmax", "argmax")
EITHER = pytest.mark.parametrize("feedback", KINDS)


def listening(kind: str = "trm", feedback: str = "softmax", **changes):
    """A model whose feedback is not at its start, where it is zero. In fp64, since free rollouts
    of fp32 drift."""
    model = build(kind, feedback=feedback, **{"forward_dtype": "float64", **changes})
    with torch.no_grad():
        model.inner.embed_feedback.embedding_weight.normal_(std=0.3)
    return model


def by_hand(model, data: dict[str, Tensor], steps: int) -> list[Tensor]:
    """The logits of every step, from the parts: x + what the last answer says of each cell."""
    inner, config = model.inner, model.config
    states = inner.initial_states(len(data["inputs"]))
    x = inner.embed(data["inputs"], data["puzzle_identifiers"], training=False)
    table, found = inner.embed_feedback.embedding_weight.double(), []
    for _ in range(steps):
        now = x.double().clone()
        for row in range(len(x)) if found else ():
            for cell in range(config.seq_len):
                logits = found[-1][row, cell]
                share = logits.double().softmax(-1)
                if config.feedback == "argmax":
                    share = torch.zeros(len(logits)).double()
                    share[int(logits.argmax())] = 1
                now[row, config.prefix_len + cell] += config.hidden_size**0.5 * (share @ table)
        states = recurx.recurse(
            inner.schedule, inner.nets(), now.to(x.dtype), states, backend="eager",
            cos_sin=inner.cos_sin(),
        )  # fmt: skip
        states = {name: state.detach() for name, state in states.items()}
        found.append(inner.heads(states)[0].detach())
    return found


@EITHER
@pytest.mark.parametrize("kind", ["trm", "mlp", "hrm"])
def test_each_step_hears_the_answer_of_the_last(kind: str, feedback: str) -> None:
    model, data = listening(kind, feedback).eval(), batch()
    carry, want = model.initial_carry(data), by_hand(model, data, 3)
    for logits in want:
        carry, outputs = model(carry, data)
        torch.testing.assert_close(outputs["logits"], logits, rtol=1e-4, atol=1e-4)
    deaf = build(kind, feedback=feedback).eval()
    deaf.load_state_dict(model.state_dict())
    deaf.inner.embed_feedback.embedding_weight.data.zero_()
    carry, _ = deaf(deaf.initial_carry(data), data)
    assert (deaf(carry, data)[1]["logits"] - want[1]).abs().max() > 0.01  # it is heard


@EITHER
def test_it_starts_as_the_net_without_and_learns_to_listen(feedback: str) -> None:
    """No random number more, so that two runs of one seed can be compared."""
    plain, fed = build("trm"), build("trm", feedback=feedback)
    state = fed.state_dict()
    table = state.pop("inner.embed_feedback.embedding_weight")
    assert not table.any() and all(torch.equal(w, state[n]) for n, w in plain.state_dict().items())
    set_q(fed, -5.0)
    head, data = ACTLossHead(fed), batch()
    carry, loss, *_ = head(carry=head.initial_carry(data), batch=data)
    loss.backward()
    grad = fed.inner.embed_feedback.embedding_weight.grad
    assert grad is None or not grad.any()  # nothing was said yet
    carry, loss, *_ = head(carry=carry, batch=data)
    assert not carry.last["last_answer"].requires_grad
    loss.backward()
    assert fed.inner.embed_feedback.embedding_weight.grad.abs().max() > 0


@EITHER
def test_a_row_that_restarts_has_no_last_answer(feedback: str) -> None:
    model, first, second = listening(feedback=feedback).eval(), batch(seed=1), batch(seed=2)
    carry, _ = model(model.initial_carry(first), first)
    _, going = model(carry, second)
    carry.halted[:] = torch.tensor([True, False, True, False])
    _, some = model(carry, second)
    _, fresh = model(model.initial_carry(second), second)
    torch.testing.assert_close(some["logits"][::2], fresh["logits"][::2])
    torch.testing.assert_close(some["logits"][1::2], going["logits"][1::2])


def test_q_learning_bootstraps_from_a_step_that_heard_this_one() -> None:
    model, data = listening("hrm", halt_exploration_prob=0.0).train(), batch()
    with torch.no_grad():
        model.inner.q_head.weight.normal_()
    carry, outputs = model(model.initial_carry(data), data)
    with torch.no_grad():
        _, _, (halt, go_on) = model.inner(carry.inner_carry, data | carry.last)
    want = torch.sigmoid(torch.maximum(halt, go_on))
    torch.testing.assert_close(outputs["target_q_continue"], want)


# ---- solving ------------------------------------------------------------------------------------


@EITHER
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_solve_carries_it_though_rows_leave(feedback: str, backend: str) -> None:
    if backend == "cpu" and recurx.backends.get("cpu").why_unavailable() is not None:
        pytest.skip("no CPU engine")
    dtype = "float64" if backend == "eager" else "float32"
    model, data = listening(feedback=feedback, forward_dtype=dtype).eval(), batch(6)
    model.backend = backend
    with torch.no_grad():
        model.inner.q_head.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(2))
        model.inner.q_head.bias.zero_()
        model.inner.q_head.bias[0] = -recurx.solve(model, data, 2, halt=None).q[:4].mean()
    want = by_hand(model, data, 4)
    found = recurx.solve(model, data, 4, halt="q", logits=True)
    assert len(found.steps.unique()) > 1, "the test needs rows that differ"
    for row, steps in enumerate(found.steps.tolist()):
        torch.testing.assert_close(found.logits[row], want[steps - 1][row], rtol=2e-2, atol=2e-2)


def test_engines_that_solve_inside_never_ignore_it(monkeypatch) -> None:
    model, data = listening(forward_dtype="float32").eval(), batch(6)
    with pytest.raises(BackendUnavailable, match="feedback='softmax'"):
        recurx.solve(model, data, 2, backend="cuda")
    monkeypatch.setattr(on_cpu, "_refine", lambda *given: pytest.fail("solved inside the engine"))
    model.backend = "cpu"
    if recurx.backends.get("cpu").why_unavailable() is None:
        recurx.solve(model, data, 2)
    with pytest.raises(InvalidArgument, match="feedback"):
        recurx.export_onnx(model, "never.onnx")


# ---- files --------------------------------------------------------------------------------------


@EITHER
def test_weights_and_configuration_are_saved(feedback: str, tmp_path) -> None:
    model = listening(feedback=feedback).eval()
    recurx.save_checkpoint(tmp_path / "net.safetensors", model)
    loaded = recurx.load_checkpoint(tmp_path / "net.safetensors").build()
    assert loaded.config == model.config
    for steps in (1, 3):
        found = [recurx.solve(m, batch(), steps, halt=None, backend="eager", logits=True).logits
                 for m in (loaded, model)]  # fmt: skip
        assert torch.equal(*found)


def test_old_configurations_and_wrong_ones() -> None:
    values = CONFIGS["trm"].to_dict()
    del values["feedback"]
    assert type(CONFIGS["trm"]).from_dict(values) == CONFIGS["trm"]
    with pytest.raises(InvalidArgument, match=r"feedback.*softmax, argmax"):
        CONFIGS["trm"].replace(feedback="logits")
    assert ModelConfig(7, 9).feedback == ""


@EITHER
def test_a_run_is_resumed_to_the_bit(feedback: str, tmp_path, monkeypatch) -> None:
    config = tiny(model={"feedback": feedback})
    whole = Trainer(config)
    for _ in range(9):
        whole.train_step()
    assert whole.model.inner.embed_feedback.embedding_weight.any()
    Trainer(config, tmp_path).run(steps=4)
    resumed, forgets = Trainer.resume(tmp_path), Trainer.resume(tmp_path)
    forgets.carry.last["last_answer"].zero_()  # planted
    for run in (resumed, forgets):
        for _ in range(5):
            run.train_step()
    assert differing(resumed, whole) == []
    assert differing(forgets, whole)


BUGS = {
    "a cell hears its neighbour": lambda answer: answer.roll(1, dims=1),
    "the logits themselves": lambda answer: answer.log(),
    "nothing": torch.zeros_like,
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_comparison_notices_a_planted_bug(bug: str, monkeypatch) -> None:
    said = Inner.answer_of
    monkeypatch.setattr(Inner, "answer_of", lambda *given: {
        key: BUGS[bug](answer) for key, answer in said(*given).items()
    })  # fmt: skip
    with pytest.raises(AssertionError, match="not close"):
        test_each_step_hears_the_answer_of_the_last("trm", "softmax")
