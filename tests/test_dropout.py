"""Dropout and stochastic depth from counters: what is dropped, who draws what, gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import recurx
from recurx import BlockSpec, InvalidArgument, Net, NetSpec, Schedule, Step, backends, reference
from recurx.models import TRM
from recurx.models.inner import problem_of_model
from recurx.operands import Beside
from recurx.specs import ATTENTION, NO_MIXER, TOKEN_MLP
from tests.variants import TOKENS, WIDTH, net_of

TWICE = Schedule((Step("L", "z", ("z",), ("x",)),) * 2)
DROPS = dict(dropout=0.3, drop_path=0.4)
SPECS = {
    "attention": BlockSpec(ATTENTION, WIDTH, 48, 4, **DROPS),
    "over T": BlockSpec(TOKEN_MLP, WIDTH, 48, tokens=TOKENS, token_inner=20, **DROPS),
    "sandwich": BlockSpec(ATTENTION, WIDTH, 48, 4, **DROPS, placement="sandwich",
                          learned_scale="channel"),
    "a mask": BlockSpec(ATTENTION, WIDTH, 48, 4, **DROPS, mask="causal", placement="pre"),
}  # fmt: skip


def branch(
    number: str, call: int = 0, block: int = 0, seed: int = 5, first: int = 0, **drops
) -> Tensor:
    """What becomes of a branch of ones [200, 20, 50]."""
    spec = BlockSpec(NO_MIXER, 50, 8, **drops)
    beside = Beside(torch.tensor([seed, first]), call=call, block=block)
    return reference.dropped(torch.ones(200, 20, 50), spec, number, beside)


def run(
    spec: BlockSpec, batch: int, seed, save: str = "all", **more
) -> tuple[Tensor, list[Tensor]]:
    """Of two blocks in two calls the result, and the gradients of x and the weights."""
    net = net_of(spec, spec, dtype=torch.float64)
    x, z = torch.randn(2, 4, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    leaves = [t.detach().requires_grad_() for t in (x, *net.weights)]
    nets = {"L": Net(net.spec, leaves[1:])}
    out = recurx.recurse(
        TWICE, nets, leaves[0][:batch], {"z": z[:batch]}, seed=seed, save=save, **more
    )["z"]
    return out.detach(), list(torch.autograd.grad(out.square().sum(), leaves))


# ---- what is dropped -----------------------------------------------------------------------------


def test_rate_and_scale() -> None:
    elements = branch("2", dropout=0.25)
    assert set(elements.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((elements == 0).float().mean() - 0.25) < 0.005  # 200,000 draws: 5 deviations
    assert abs(elements.mean() - 1) < 0.007
    paths = branch("2", drop_path=0.25)
    assert torch.equal(paths, paths[:, :1, :1].expand_as(paths))  # a sample as a whole
    assert set(paths.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((paths[:, 0, 0] == 0).float().mean() - 0.25) < 0.1  # 200 draws: 3 deviations
    both = branch("2", dropout=0.25, drop_path=0.25)
    torch.testing.assert_close(both, elements * paths)


def test_streams_are_independent() -> None:
    """Of calls, blocks, branches, seeds, samples, fields no two agree more than by chance."""
    ways = [dict(), dict(call=1), dict(block=1), dict(block=2), dict(seed=6), dict(first=200)]
    drawn = {str(how): branch("2", dropout=0.5, **how) == 0 for how in ways}
    drawn["branch 1"] = branch("1", dropout=0.5) == 0
    drawn["another sample"] = drawn["{}"].roll(1, 0)
    drawn["another element"] = drawn["{}"].roll(1, 2)
    path = branch("2", drop_path=0.5) == 0
    drawn["path"] = path[:, :1, :1].expand_as(path)
    for a, first in drawn.items():
        for b, second in drawn.items():
            least = 0.15 if "path" in (a, b) else 0.01
            assert a == b or abs((first == second).float().mean() - 0.5) < least, (a, b)


def test_a_block_written_out() -> None:
    spec = dataclasses.replace(SPECS["attention"], placement="pre")
    weights = net_of(spec, dtype=torch.float64).weights
    h = torch.randn(3, TOKENS, WIDTH, dtype=torch.float64)
    beside = Beside(torch.tensor([9, 0]), call=4, block=1)
    want = h
    for number in "12":
        plain = dataclasses.replace(spec, dropout=0.0, drop_path=0.0)
        w = {name: weight for (name, _), weight in zip(spec.slots, weights, strict=True)}
        normed = reference.rms_norm(want, 1e-5)
        part = (
            reference.variant_attention(normed, plain, w, None)
            if number == "1" else reference.variant_mlp(normed, plain, w, "")
        )  # fmt: skip
        mask = reference.dropped(torch.ones_like(part), spec, number, beside)
        want = want + part * mask
    torch.testing.assert_close(reference.block(h, spec, weights, None, beside), want)


@pytest.mark.parametrize("name", SPECS)
def test_zero_is_evaluation(name: str) -> None:
    """Bit for bit the block without these fields, which takes no seed."""
    spec = SPECS[name]
    off = dataclasses.replace(spec, dropout=0.0, drop_path=0.0)
    assert off.slots == spec.slots and not {"dropout", "drop_path"} & set(off.changed)
    assert BlockSpec.from_key(spec.key) == spec
    out, _ = run(spec, 4, 1)
    calm, _ = run(off, 4, None)
    assert (out - calm).abs().max() > 0.1
    with pytest.raises(InvalidArgument, match="seed"):
        run(off, 4, 1)


# ---- who draws what ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_any_split_of_a_batch_drops_the_same(name: str) -> None:
    whole, _ = run(SPECS[name], 4, torch.tensor([7, 0]))
    net = net_of(SPECS[name], SPECS[name], dtype=torch.float64)
    x, z = torch.randn(2, 4, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    parts = [
        recurx.recurse(TWICE, {"L": net}, x[own], {"z": z[own]}, seed=torch.tensor([7, own.start]))
        for own in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(torch.cat([part["z"] for part in parts]), whole)
    apart = recurx.recurse(TWICE, {"L": net}, x[1:], {"z": z[1:]}, seed=7)["z"]
    assert (apart - whole[1:]).abs().max() > 0.1  # the first sample's number left out


def test_split_calls_drop_what_calls_together_do() -> None:
    spec = SPECS["attention"]
    net = net_of(spec, spec)
    x, z = torch.randn(2, 2, TOKENS, WIDTH)
    want = recurx.recurse(TWICE, {"L": net}, x, {"z": z}, seed=3)
    half = recurx.recurse(TWICE, {"L": net}, x, {"z": z}, seed=3, stop_after=1)
    rest = recurx.recurse(TWICE, {"L": net}, x, half, seed=3, start_from=1)
    assert torch.equal(rest["z"], want["z"])


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_of_the_same_masks(name: str) -> None:
    """Whatever is computed again draws what the forward drew."""
    want, wanted = run(SPECS[name], 4, 1, "all")
    for save in ("block", "states"):
        out, got = run(SPECS[name], 4, 1, save)
        assert torch.equal(out, want)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("save", ["all", "block", "states"])
def test_finite_differences(save: str) -> None:
    spec = SPECS["sandwich"]
    net = net_of(spec, dtype=torch.float64)
    z = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)

    def answer(x: Tensor, *weights: Tensor) -> Tensor:
        nets = {"L": Net(net.spec, weights)}
        return recurx.recurse(TWICE, nets, x, {"z": z}, seed=3, save=save)["z"]

    leaves = [t.requires_grad_() for t in (torch.randn_like(z), *net.weights)]
    assert torch.autograd.gradcheck(answer, leaves, fast_mode=True)


def other_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the backward alone: it counts calls from another one on."""
    from recurx import reference_backward

    right = reference.variant_block
    monkeypatch.setattr(
        reference_backward.reference, "variant_block",
        lambda h, spec, w, rope, beside: right(
            h, spec, w, rope,
            beside._replace(call=beside.call + 1) if h.requires_grad and h.is_leaf else beside,
        ),
    )  # fmt: skip


def a_block_late(monkeypatch: pytest.MonkeyPatch) -> None:
    from recurx import reference_backward

    right = reference_backward.block_backward
    late = lambda *given: right(*given[:-1], given[-1]._replace(block=0))  # noqa: E731
    monkeypatch.setattr(reference_backward, "block_backward", late)


@pytest.mark.parametrize("bug", [other_counter, a_block_late])
def test_a_planted_bug_of_the_masks_bites(bug, monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        test_gradients_are_of_the_same_masks("attention")


def test_a_missing_scale_bites(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.dropped

    def unscaled(out: Tensor, spec: BlockSpec, number: str, beside: Beside) -> Tensor:
        return torch.where(right(out, spec, number, beside) == 0, 0, out)

    monkeypatch.setattr(reference, "dropped", unscaled)
    with pytest.raises(AssertionError):
        test_rate_and_scale()


# ---- who runs it ---------------------------------------------------------------------------------


def test_engines_refuse_by_name() -> None:
    net = (("L", NetSpec((SPECS["attention"],))),)
    problem = recurx.Problem(TWICE, net, 2, TOKENS, WIDTH, torch.float32, "cpu")
    for name in backends.ORDER:
        said = backends.unknown_fields(backends.get(name), problem)
        if name in ("eager", "cpu", "triton"):  # the last replays the reference
            assert said is None
        else:
            assert "does not run dropout=0.3" in said
    assert backends.unknown_fields(backends.get("triton/tiled"), problem) is not None


@pytest.mark.parametrize(
    "wrong", [dict(dropout=1.0), dict(dropout=1 - 1e-9), dict(drop_path=-0.1), dict(dropout="0.1")]
)
def test_impossible_shares_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(wrong))):
        BlockSpec(NO_MIXER, WIDTH, 8, **wrong)


@pytest.mark.parametrize("block", ["dropout:0.2,drop_path:0.2", "activation:gelu,dropout:0.5"])
def test_models_drop_in_training_alone(block: str) -> None:
    sizes = dict(vocab_size=7, seq_len=9, hidden_size=32, num_heads=2, inner_multiple=8,
                 H_cycles=1, L_cycles=1, forward_dtype="float32")  # fmt: skip
    torch.manual_seed(0)
    model = TRM(dict(sizes, block=block)).inner
    torch.manual_seed(0)
    rest = ",".join(part for part in block.split(",") if "drop" not in part)
    plain = TRM(dict(sizes, block=rest)).inner
    batch, states = {"inputs": torch.randint(7, (4, 9))}, model.initial_states(4)
    weights = {name for name, _ in model.named_parameters()}
    assert weights == {name for name, _ in plain.named_parameters()}  # the official names
    want = plain(states, batch)[0]["z_H"]
    for evaluated in (model.eval()(states, batch), model.train()(states, batch, training=False)):
        assert torch.equal(evaluated[0]["z_H"], want)
    first, second = (model(states, batch)[0]["z_H"] for _ in range(2))
    assert (first - want).abs().max() > 0.05 and (first - second).abs().max() > 0.05
    model.noise_seed.sub_(1)  # as a restart from that state
    assert torch.equal(model(states, batch)[0]["z_H"], second)
    assert "dropout" in problem_of_model(model).changed
    assert "dropout" not in problem_of_model(model.eval()).changed
    answers = recurx.solve(TRM(dict(sizes, block=block)), batch, max_steps=2)
    assert answers.predictions.shape == (4, 9)
