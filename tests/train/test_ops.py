"""The step's ops in plain PyTorch against their formulas, and planted bugs that must fail."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from recurx.errors import InvalidArgument
from recurx.models import PuzzleEmbedding, fused_stablemax_cross_entropy, stablemax_cross_entropy
from recurx.models.puzzle_embedding import sign_sgd_
from recurx.train import AdamATan2, Average, SparseSignSGD
from tests.cpu import build
from tests.train import cases, guards

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


# ---- stablemax ----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("name", cases.LOGITS)
def test_stablemax_and_its_gradient_keep_the_stated_bound(name: str, dtype: torch.dtype) -> None:
    logits, labels = cases.logits_and_labels(name, dtype)
    logits.requires_grad_()
    outer = torch.linspace(-1, 2, labels.numel()).view(labels.shape)
    loss = fused_stablemax_cross_entropy(logits, labels)
    assert loss.dtype == torch.float32 and (loss[0, :2] == 0).all()
    cases.assert_stablemax(loss.detach(), logits.detach(), labels)
    (loss * outer).sum().backward()
    assert (logits.grad[0, :2] == 0).all()
    cases.assert_stablemax_grad(logits.grad, logits.detach(), labels, outer)


def test_the_formula_of_the_test_is_the_published_one() -> None:
    logits, labels = cases.logits_and_labels("usual")
    want = stablemax_cross_entropy(logits, labels)
    torch.testing.assert_close(cases.stablemax_fp64(logits, labels), want)


def _published_in_fp32(logits, labels):
    s = torch.where(logits < 0, 1 / (1 - logits), logits + 1)
    picked = (s / s.sum(-1, keepdim=True)).log().gather(-1, labels.clamp(min=0).unsqueeze(-1))
    return torch.where(labels != -100, -picked.squeeze(-1), 0)


@pytest.mark.parametrize("name", ["sure of the label", "extreme", "largest"])
def test_the_published_formula_in_fp32_breaks_the_bound(name: str) -> None:
    logits, labels = cases.logits_and_labels(name)
    with pytest.raises(AssertionError, match="allowed relative error"):
        cases.assert_stablemax(_published_in_fp32(logits, labels), logits, labels)


STABLEMAX_BUGS = {
    "softmax": lambda x, y: torch.nn.functional.cross_entropy(
        x.movedim(-1, 1), y, reduction="none"
    ),
    "the label counted twice": lambda x, y: torch.log(cases.stablemax_fp64(x, y).exp() + 1),
    "one part in 100,000": lambda x, y: cases.stablemax_fp64(x, y) * (1 + 1e-5),
}


@pytest.mark.parametrize("bug", STABLEMAX_BUGS)
def test_the_stablemax_bound_bites(bug: str) -> None:
    logits, labels = cases.logits_and_labels("usual")
    with pytest.raises(AssertionError, match="allowed relative error"):
        cases.assert_stablemax(STABLEMAX_BUGS[bug](logits, labels), logits, labels)


def test_the_gradient_bound_bites() -> None:
    logits, labels = cases.logits_and_labels("usual")
    outer = torch.ones(labels.shape)
    exact = cases.stablemax_grad_fp64(logits, labels, outer)
    cases.assert_stablemax_grad(exact.float(), logits, labels, outer)
    softmax_like = exact * (1 + logits.double().abs())  # the slope of s forgotten
    for wrong in (softmax_like, -exact, exact * (1 + 1e-5)):
        with pytest.raises(AssertionError, match="gradient"):
            cases.assert_stablemax_grad(wrong.float(), logits, labels, outer)


def test_stablemax_differentiates_in_fp64_takes_masks_and_compiles() -> None:
    logits, labels = cases.logits_and_labels("usual", torch.float64)
    wide = logits[:2, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: fused_stablemax_cross_entropy(x, labels[:2, :3]), wide
    )
    mask = labels != -100
    masked = fused_stablemax_cross_entropy(logits, labels.clamp(min=0), valid_mask=mask)
    assert torch.equal(masked, fused_stablemax_cross_entropy(logits, labels))
    arguments = (logits.requires_grad_(), labels, -100)
    torch.library.opcheck(torch.ops.recurx.stablemax.default, arguments)


# ---- AdamATan2 ----------------------------------------------------------------------------------


def run_adam(weights, grads, lr=cases.ADAM["lr"]) -> list[torch.Tensor]:
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = AdamATan2(params, **{**cases.ADAM, "lr": lr})
    for now in grads:
        for param, grad in zip(params, now, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return [p.detach() for p in params]


@pytest.fixture
def engine_steps(monkeypatch) -> list[int]:
    """The number of tensors in each call of the CPU engine's step."""
    native = pytest.importorskip("recurx._C", reason="recurx._C is not built")
    seen, real = [], native.cpu_adam_atan2

    def spy(isa, tensors, *more):
        seen.append(len(tensors))
        real(isa, tensors, *more)

    monkeypatch.setattr(native, "cpu_adam_atan2", spy)
    return seen


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_adam_atan2_against_fp64(lr, monkeypatch) -> None:
    guards.formula_alone(monkeypatch)
    weights, grads = cases.weights_and_grads(steps=5)
    cases.assert_weights(run_adam(weights, grads, lr), cases.adam_atan2_fp64(weights, grads), 5)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("isa", build.usable() or [None])
def test_the_engine_steps_fp32_weights(isa, engine_steps, monkeypatch) -> None:
    """One call a step, by every instruction set; the same bits for any number of threads."""
    monkeypatch.setenv("RECURX_CPU_ISA", isa)
    weights, grads = cases.weights_and_grads(steps=5)
    weights.append(torch.randn(300, 700))
    for now in grads:
        now.append(torch.randn(300, 700))
    lr = torch.tensor(0.1)
    got = run_adam(weights, grads, lr)
    cases.assert_weights(got, cases.adam_atan2_fp64(weights, grads), 5)
    assert engine_steps == [len(weights)] * 5
    torch.set_num_threads(3)
    again = run_adam(weights, grads)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("value", [0.0, 1e-30, -1e-22, 3e19, math.inf, -math.inf, math.nan])
def test_the_engine_steps_as_the_formula_on_any_gradient(value, engine_steps, monkeypatch) -> None:
    """Of zero, of squares beyond fp32 at either end, and of what is no number."""
    weights = [torch.tensor([1.0, -2.0, 0.5])]
    grads = [[torch.tensor([value, 1.0, value])]] * 3
    got = run_adam(weights, grads)
    assert engine_steps == [1] * 3
    guards.formula_alone(monkeypatch)
    torch.testing.assert_close(got, run_adam(weights, grads), rtol=1e-6, atol=0, equal_nan=True)


def test_the_engine_steps_views_and_counts_their_versions(engine_steps) -> None:
    """Weights that begin anywhere; what lies between them stays, and autograd knows of writes."""
    weights, grads = cases.weights_and_grads(steps=1)
    room = torch.full((sum(w.numel() + 1 for w in weights) + 1,), 7.0)
    params, at = [], 1
    for w in weights:
        params.append(torch.nn.Parameter(room[at : at + w.numel()].view(w.shape).copy_(w)))
        at += w.numel() + 1
    for param, grad in zip(params, grads[0], strict=True):
        param.grad = grad
    versions = [p._version for p in params]
    AdamATan2(params, **cases.ADAM).step()
    cases.assert_weights([p.detach() for p in params], cases.adam_atan2_fp64(weights, grads), 1)
    gaps = torch.tensor([0, *(w.numel() + 1 for w in weights)]).cumsum(0)
    assert engine_steps and (room[gaps] == 7).all()
    assert all(p._version > before for p, before in zip(params, versions, strict=True))


@pytest.mark.usefixtures("threads")
def test_weights_that_share_memory_move_one_after_the_other(engine_steps) -> None:
    """The same bits for any number of threads: each of two views moves the whole buffer."""
    found = []
    for count in (1, 4):
        torch.set_num_threads(count)
        room = torch.ones(4_000_000)
        params = [torch.nn.Parameter(room[:-3_000_000]), torch.nn.Parameter(room[500_000:])]
        for param, grad in zip(params, (1.0, -3.0), strict=True):
            param.grad = torch.full_like(param, grad)
        AdamATan2(params, **cases.ADAM).step()
        found.append(room)
    assert engine_steps == [2, 2] and torch.equal(*found)


def test_the_engine_leaves_what_it_does_not_know_to_the_formula(engine_steps) -> None:
    """Strided gradients, other dtypes, and operations that a mode watches."""
    weights = [torch.randn(6, 4), torch.randn(6, 4).double()]
    grads = [[torch.randn(4, 6).t(), torch.randn(6, 4).double()]]
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    for param, grad in zip(params, grads[0], strict=True):
        param.grad = grad
    AdamATan2(params, **cases.ADAM).step()
    cases.assert_weights([p.detach().float() for p in params],
                         cases.adam_atan2_fp64(weights, grads), 1)  # fmt: skip
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    with guards.NoHostSync():
        AdamATan2([param], **cases.ADAM).step()
    assert engine_steps == []


def test_bf16_weights_have_fp32_means_also_after_loading() -> None:
    weights, grads = cases.weights_and_grads(steps=3, dtype=torch.bfloat16)
    cases.assert_weights(run_adam(weights, grads), cases.adam_atan2_fp64(weights, grads), 3)
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = AdamATan2(params, **cases.ADAM)
    for param, grad in zip(params, grads[0], strict=True):
        param.grad = grad
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    other = AdamATan2([torch.nn.Parameter(w.clone()) for w in weights], **cases.ADAM)
    other.load_state_dict(saved)
    for got, want in zip(other.state.values(), optimizer.state.values(), strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert got[key].dtype == torch.float32 and torch.equal(got[key], want[key])


ADAM_BUGS = {
    "no bias correction": {"step_of": lambda t: 10**6},
    "count from zero": {"step_of": lambda t: t + 1},
    "betas swapped": {"betas": (0.95, 0.9)},
    "no decay": {"weight_decay": 0.0},
    "a quotient": {"angle": lambda m, s: torch.where(s > 0, m / s.clamp_min(1e-300), 0)},
}


@pytest.mark.parametrize("bug", ADAM_BUGS)
def test_the_adam_tolerance_bites(bug: str) -> None:
    weights, grads = cases.weights_and_grads(steps=5)
    wrong = [w.float() for w in cases.adam_atan2_fp64(weights, grads, **ADAM_BUGS[bug])]
    with pytest.raises(AssertionError, match="entries differ"):
        cases.assert_weights(wrong, cases.adam_atan2_fp64(weights, grads), 5)


def test_weights_without_a_gradient_stay_and_count_apart() -> None:
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = AdamATan2([first, second], lr=0.1)
    first.grad = torch.ones(3)
    optimizer.step()
    second.grad = torch.ones(3)
    optimizer.step()
    assert (optimizer.state[first]["step"], optimizer.state[second]["step"]) == (2, 1)
    second.grad = torch.ones(3).to_sparse()
    with pytest.raises(InvalidArgument, match="SparseSignSGD"):
        optimizer.step()
    with pytest.raises(InvalidArgument, match="0-d tensor"):
        AdamATan2([first], lr=torch.ones(2))


# ---- sign SGD -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.125, torch.tensor(0.125)], ids=["float", "tensor"])
@pytest.mark.parametrize("duplicates", [True, False])
def test_sign_sgd_is_the_official_rule(lr, duplicates: bool) -> None:
    table, grads, ids = cases.table_and_batch(duplicates)
    want = cases.official_sign_sgd(table, grads, ids, 0.125, 0.5)
    sign_sgd_(table, grads, ids, lr, 0.5)
    assert torch.equal(table, want)


def test_sign_sgd_notices_duplicates_and_touched_rows() -> None:
    table, grads, ids = cases.table_and_batch()
    want = cases.official_sign_sgd(table, grads, ids, 0.125, 0.5)
    last_wins = table.clone()
    last_wins[ids.long()] = table[ids.long()] * (1 - 0.125 * 0.5) - 0.125 * grads.sign()
    decays_all = want.clone()
    decays_all[20:] *= 1 - 0.125 * 0.5
    assert not torch.equal(last_wins, want) and not torch.equal(decays_all, want)


def test_sparse_sign_sgd_takes_the_buffers_of_an_embedding() -> None:
    embedding = PuzzleEmbedding(6, 4, batch_size=3, cast_to=torch.float32, init_std=1.0)
    ids = torch.tensor([2, 2, 5])
    before = embedding.weights.clone()
    optimizer = SparseSignSGD(embedding.buffers(), lr=0, weight_decay=0.5)
    optimizer.step()  # no backward yet
    assert torch.equal(embedding.weights, before)
    embedding(ids).mul(torch.tensor([[1.0], [-3.0], [2.0]])).sum().backward()
    optimizer.param_groups[0]["lr"] = 0.1
    grads = embedding.local_weights.grad.clone()
    optimizer.step()
    want = cases.official_sign_sgd(before, grads, ids, 0.1, 0.5)
    torch.testing.assert_close(embedding.weights, want)
    with pytest.raises(InvalidArgument, match=r"puzzle_emb\.buffers"):
        SparseSignSGD([embedding.weights])


# ---- the average --------------------------------------------------------------------------------


def test_the_average_counts_on_the_device_and_keeps_fp32() -> None:
    model = torch.nn.Linear(3, 2).bfloat16()
    average = Average(model, decay=0.999)
    exact = {name: w.double() for name, w in average.weights.items()}
    for step in range(30):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.5)
        average.update(model)
        decay = min(0.999, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            exact[name] = decay * exact[name] + (1 - decay) * p.detach().double()
    assert average.updates == 30 and average.count.dtype == torch.float32
    for name, want in exact.items():
        assert average.weights[name].dtype == torch.float32
        torch.testing.assert_close(average.weights[name].double(), want, rtol=1e-6, atol=1e-6)
