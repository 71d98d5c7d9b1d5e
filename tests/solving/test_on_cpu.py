"""recurx.solve inside the CPU engine (csrc/cpu/solve.cpp): queue, heads, halting, noise.

The yardstick is the loop over the same engine, one call a step: the states are equal to the bit,
so whatever differs comes from the solving itself.
"""

from __future__ import annotations

import pytest
import torch

import recurx
from recurx import backends
from recurx.models import HRM, TRM
from recurx.models.config import HRMConfig, TRMConfig
from recurx.solving import on_cpu
from tests import alone
from tests.small_solvers import MODELS, SMALL, TOKENS, VOCAB

CPU = backends.get("cpu")
pytestmark = pytest.mark.skipif(
    CPU.why_unavailable() is not None, reason=str(CPU.why_unavailable())
)

RULES = {
    "q": {},
    "every step": dict(halt=None, logits=True, trace=True),
    "fixed point": dict(halt="fixed-point", patience=1, trace=True),
    "any": dict(halt="any", patience=2, halt_above=0.5, logits=True),
    "noise": dict(rollouts=3, sigma=0.2, seed=5, first_sample=7, select="vote"),
    "random starts": dict(rollouts=3, init="random", init_scale=0.7, trace=True),
    "in turn": dict(rollouts=3, sigma=0.3, select=lambda inputs, answers: answers[:, 0] > 2),
}


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def make(**changes):
    """A model whose samples halt after unlike numbers of steps."""
    torch.manual_seed(3)
    config = {**SMALL, "forward_dtype": "float32", **changes}
    model = HRM(HRMConfig(**config)) if config.get("variant") == "hrm" else TRM(TRMConfig(**config))
    with torch.no_grad():
        model.inner.q_head.weight.normal_(std=0.3)
        model.inner.q_head.bias.zero_()
        if config.get("puzzle_emb_ndim"):
            model.inner.puzzle_emb.weights.normal_()
    model.backend = "cpu"
    return model.eval()


def puzzles(count=23):
    generator = torch.Generator().manual_seed(5)
    return {
        "inputs": torch.randint(0, VOCAB, (count, TOKENS), generator=generator, dtype=torch.int32),
        "puzzle_identifiers": torch.arange(count, dtype=torch.int32) % 3,
    }


@pytest.fixture
def calls(monkeypatch):
    """What the engine was asked to solve, one entry a call."""
    made, solve = [], type(CPU).solve

    def counted(self, problem, operands, how, progress=None):
        made.append(problem.batch)
        return solve(self, problem, operands, how, progress)

    monkeypatch.setattr(type(CPU), "solve", counted)
    return made


def by_the_loop(model, batch, **rules):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(on_cpu, "refiner", lambda *given: given[4])
        return recurx.solve(model, batch, **rules)


def differences(inside, loop, same_batches=True):
    """Names of what is not the same."""
    found = []
    for name in ("predictions", "steps", "halted", "rollout_steps", "trace", "q", "logits"):
        got, want = getattr(inside, name), getattr(loop, name)
        if got is None or want is None:
            same = got is want
        elif name in ("q", "logits") and (loop.halted.any() or not same_batches):
            # PyTorch's product of a batch of another size may round otherwise.
            same = got.dtype == want.dtype and torch.allclose(got, want, rtol=1e-5, atol=1e-5)
        else:
            same = torch.equal(got, want)
        if not same:
            found.append(name)
    return found


CASES = [(model, rules) for model in MODELS for rules in RULES]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes, rules",
    [case for case in CASES if case[0] == "attention" or case[1] in ("q", "every step")],
)
def test_the_answers_are_those_of_the_loop(changes, rules, dtype, calls):
    model, batch = make(**MODELS[changes], forward_dtype=dtype), puzzles()
    inside = recurx.solve(model, batch, 5, **RULES[rules])
    assert calls, "the loop answered"
    loop = by_the_loop(model, batch, max_steps=5, **RULES[rules])
    assert not differences(inside, loop)
    if (changes, rules) == ("attention", "q"):
        assert len(set(inside.steps.tolist())) > 1, "all took the same steps: nothing was queued"


@pytest.mark.parametrize("isa", CPU._engine().cpu_isas() if CPU.why_unavailable() is None else [])
def test_every_instruction_set(isa, monkeypatch, calls):
    monkeypatch.setenv("RECURX_CPU_ISA", isa)
    for dtype in ("float32", "bfloat16"):
        model = make(forward_dtype=dtype)
        rules = dict(max_steps=4, rollouts=2, sigma=0.1)
        assert not differences(
            recurx.solve(model, puzzles(), **rules), by_the_loop(model, puzzles(), **rules)
        )
    assert len(calls) == 2


def test_a_queue_of_several_parts(monkeypatch, calls):
    """Rows that do not fit into memory at once are solved one part after the other."""
    model, told = make(), []
    rules = dict(max_steps=5, halt="fixed-point", trace=True, logits=True)
    monkeypatch.setattr(on_cpu, "MOST_BYTES", 9 * TOKENS * 64 * 4)
    monkeypatch.setattr(on_cpu, "LEAST_ROWS", 1)
    inside = recurx.solve(model, puzzles(), progress=told.append, **rules)
    assert calls == [9, 9, 5]
    loop = by_the_loop(model, puzzles(), **rules)
    assert not differences(inside, loop, same_batches=False)
    assert told == sorted(told) and told[-1] == 23


@pytest.mark.parametrize(
    "field, wrong",
    [
        ("max_steps", 4), ("by_q", False), ("against_continue", True), ("above", -50.0),
        ("patience", 1), ("by_answer", False), ("sigma", 0.4), ("seed", 6), ("output", None),
        ("prefix", 3), ("vocab", VOCAB - 1), ("q_bias", (1.0, 0.0)), ("numbers", None),
        ("start_each", False),
    ],
)  # fmt: skip
def test_each_word_to_the_engine_bites(field, wrong, monkeypatch):
    model, batch = make(puzzle_emb_ndim=64, puzzle_emb_len=2, num_puzzle_identifiers=3), puzzles()
    rules = dict(max_steps=5, halt="any", rollouts=2, sigma=0.2, seed=5, halt_above=0.5)
    rules |= dict(init="random", patience=2)
    if field == "by_answer":
        model, rules = make(), dict(max_steps=9, halt="fixed-point", patience=1)
    rules["trace"] = field in ("prefix", "vocab")
    loop, solve = by_the_loop(model, batch, **rules), type(CPU).solve

    def planted(self, problem, operands, how, progress=None):
        value = wrong
        if field == "numbers":
            value = how["steps"]  # zeros: one stream of noise for all
        if field == "output":
            value = 3 - how["output"]  # the other state
        return solve(self, problem, operands, {**how, field: value}, progress)

    assert not differences(recurx.solve(model, batch, **rules), loop)
    monkeypatch.setattr(type(CPU), "solve", planted)
    assert differences(recurx.solve(model, batch, **rules), loop)


def test_reruns_are_equal_to_the_bit():
    model, batch = make(), puzzles()
    first = recurx.solve(model, batch, 5, logits=True, rollouts=2, sigma=0.1)
    for _ in range(20):
        again = recurx.solve(model, batch, 5, logits=True, rollouts=2, sigma=0.1)
        assert torch.equal(again.q, first.q) and torch.equal(again.logits, first.logits)


def test_what_the_engine_cannot_is_left_to_the_loop(calls):
    model, batch = make(), puzzles()
    recurx.solve(model, batch, 2, fill=recurx.Fill(blank=0))
    recurx.solve(model, {key: value[:1] for key, value in batch.items()}, 2)  # split over threads
    recurx.solve(model, batch, 2, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        recurx.solve(model, batch, 2)
    handle = model.inner.lm_head.register_forward_hook(lambda *_: None)
    recurx.solve(model, batch, 2)
    handle.remove()
    model.inner.lm_head = torch.nn.Linear(64, VOCAB, bias=False)
    recurx.solve(model, batch, 2)
    assert not calls
    recurx.solve(make(), {key: value[:0] for key, value in batch.items()}, 2)
    recurx.solve(make(), batch, 2)
    assert calls == [23]


def test_nan_is_the_largest_logit_as_in_pytorch(calls):
    model = make()
    with torch.no_grad():
        model.inner.lm_head.weight[4] = float("nan")
    answers = recurx.solve(model, puzzles(), 2)
    assert calls and (answers.predictions == 4).all()


def heavy():
    """A solve of many seconds."""
    model = make(hidden_size=256, num_heads=8, H_cycles=3, L_cycles=6, L_layers=2)
    return model, puzzles(400), dict(max_steps=200, halt=None)


def test_ctrl_c():
    alone.passes("solving/ctrl_c.py")


def test_progress_tells_and_its_error_ends_the_solve(calls):
    told: list[int] = []
    model = make()
    recurx.solve(model, puzzles(), 3, progress=told.append)
    assert told[-1] == 23 and calls
    by_loop: list[int] = []
    by_the_loop(model, puzzles(), max_steps=3, progress=by_loop.append)
    assert by_loop[-1] == 23 and by_loop == sorted(by_loop)

    def full(done):
        raise RuntimeError("the disk is full")

    model, batch, rules = heavy()
    with pytest.raises(RuntimeError, match="the disk is full"):
        recurx.solve(model, batch, progress=full, **rules)
