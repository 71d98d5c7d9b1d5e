"""Fields of blocks in kind "library" of backend "triton": numerics, launches, planted bugs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")
from mutants import planted
from recurx.kernels.fields import FIELDS
from simulate import FakeGraphs, triton_on_cpu

import recurx
from recurx import BlockSpec, Net, NetSpec, Schedule, Step, backends, reference
from recurx.specs import NORM
from tests.factories import make_inputs, problem_for, rounded, wide
from tests.kernels.compare import assert_as_exact
from tests.variants import TOKENS, VARIANTS, net_of, tables_of

ONE = Schedule((Step("L", "z", ("z",), ("x",)),))
TWICE = Schedule(ONE.steps * 2)
WIDTH = 64
_DROPS = dict(dropout=0.3, drop_path=0.4)
MORE: dict[str, dict[str, Any]] = {
    "token MLP over D, biases": dict(
        VARIANTS["token MLP normed over D"], biases=("t_gate_up", "t_down"), gated=False
    ),
    "token MLP, inner norms": dict(
        VARIANTS["token MLP normed over D"], token_norm="tokens", inner_norm="rms",
        inner_norm_weight=True, inner_norm_tokens=True, placement="sandwich",
    ),
    "token MLP, norms of products": dict(
        VARIANTS["token MLP normed over D"], inner_norm="layer", inner_norm_tokens=True,
        inner_norm_of="product", biases=("t_gate_up", "gate_up"),
    ),
    "biases before the convolution": dict(
        VARIANTS["convolution before the gate"], biases=("gate_up",), inner_norm="rms",
        residual_scale=0.5, learned_scale="scalar",
    ),
    "dropout, sandwich": dict(VARIANTS["sandwich"], dropout=0.3, learned_scale="channel"),
    "paths, pre-norm": dict(VARIANTS["channel scales"], drop_path=0.4),
    "token MLP, dropping": dict(VARIANTS["constant skips"], **_DROPS),
    "URM": dict(VARIANTS["ConvSwiGLU"], conv_dtype="bfloat16"),
    "URM, before the gate": dict(
        VARIANTS["convolution before the gate"], conv_dtype="bfloat16", placement="sandwich",
        biases=("gate_up", "down"), inner_norm="rms", inner_norm_weight=True,
    ),
    "padding": dict(VARIANTS["norm weights"], key_padding=True),
    "padding, masks, gate": dict(
        VARIANTS["grouped heads, gate, prefix"], key_padding=True, window=5
    ),
    "columns, padding, gate": dict(
        VARIANTS["grouped heads, gate, prefix"], key_padding=True, axial=(4, 3, 0), prefix=2
    ),
    "rows, padding, gate": dict(
        VARIANTS["plain QK-norm, window"], key_padding=True, axial=(3, 4, 1), attn_gate=True
    ),
    "token MLP over D, dropping": dict(VARIANTS["token MLP normed over D"], **_DROPS),
}  # fmt: skip
NAMES = [*VARIANTS, *MORE]


def spec_of(name: str) -> BlockSpec:
    """With heads that kernels have: two, or four in groups."""
    fields = {**{**VARIANTS, **MORE}[name], "hidden": WIDTH}
    if "num_heads" in fields:
        fields |= {"num_heads": 4, "head_size": 32} if "kv_heads" in fields else {"num_heads": 2}
        fields |= {"head_size": 64} if name == "causal window, QK-norm" else {}
    return BlockSpec(**fields)


def library(
    net: Net, x: torch.Tensor, carry: dict, cos_sin: Any, schedule: Schedule = ONE, **beside: Any
) -> torch.Tensor:
    how = dict(backend="triton/library", cos_sin=cos_sin, **beside)
    return recurx.recurse(schedule, {"L": net}, x, carry, **how)["z"]


def beside_of(net: Net, batch: int = 2, seed: int = 1) -> dict[str, Any]:
    """What its blocks read beside weights; tokens of the last sample see nobody."""
    beside, changed = {}, {*net.spec.changed}
    if {"dropout", "drop_path"} & changed:
        beside["seed"] = torch.tensor([2**40 + seed, 3])
    if "key_padding" in changed:
        draws = torch.rand(batch, TOKENS, generator=torch.Generator().manual_seed(seed))
        beside["key_mask"] = draws < torch.tensor([0.5] * (batch - 1) + [1.0])[:, None]
    return beside


def judged(net: Net, cos_sin: Any, dtype: torch.dtype, batch: int = 2) -> None:
    """The second of two calls against fp64; with draws, which count calls, the third too. A
    convolution in a dtype of its own is PyTorch's inaccuracy."""
    beside = beside_of(net, batch)
    calls = Schedule(ONE.steps * (3 if beside else 2))
    x, carry = make_inputs(calls, batch=batch, tokens=TOKENS, hidden=WIDTH, dtype=dtype)
    exact_net, net = (rounded(net, dtype, to) for to in (torch.float64, torch.float32))
    blocks = tuple(dataclasses.replace(block, conv_dtype="") for block in net.spec.blocks)
    exact_net = Net(NetSpec(blocks), exact_net.weights)
    exact = reference.run(calls, {"L": exact_net}, x.double(), wide(carry), cos_sin, 1, **beside)
    plain = reference.run(calls, {"L": net}, x, carry, cos_sin, 1, **beside)
    got = library(net, x, carry, cos_sin, calls, start_from=1, **beside)
    assert_as_exact(got, plain["z"], exact["z"])


@pytest.mark.parametrize("name", NAMES)
def test_one_call_against_fp64(name: str) -> None:
    """Two blocks, the second of which may be begun by the end of the first."""
    spec = spec_of(name)
    with triton_on_cpu("library"):
        judged(net_of(spec, spec, seed=1), tables_of(spec), torch.bfloat16)


def stack() -> tuple[Net, Any]:
    """Pre-norm blocks of several kinds and placements, a norm at the end."""
    pre, token = spec_of("pre-LayerNorm, ReLU"), spec_of("token MLP, pre-norm, biases")
    last = BlockSpec(NORM, WIDTH, 0, norm="layer", norm_weight=True)
    return net_of(pre, token, spec_of("ConvSwiGLU"), pre, last, seed=1), tables_of(pre)


def test_a_stack_that_ends_in_a_norm() -> None:
    with triton_on_cpu("library"):
        judged(*stack(), torch.bfloat16)


BESIDE = [name for name in NAMES if beside_of(net_of(spec_of(name)))]
BESIDE += [name for name in NAMES if spec_of(name).conv_dtype]


@pytest.mark.parametrize("name", BESIDE)
def test_fp32_and_many_samples(name: str) -> None:
    spec = spec_of(name)
    with triton_on_cpu("library", slice=3):
        judged(net_of(spec, spec, seed=1), tables_of(spec), torch.float32, batch=7)


@pytest.mark.parametrize("name", ["paths, pre-norm", "token MLP, dropping", "padding"])
def test_slices_and_replays_read_what_is_theirs(name: str) -> None:
    """Seeds and masks. Three samples in slices of two; draws count calls, so either of two calls
    alone is a graph of its own."""
    spec = spec_of(name)
    net, cos_sin, graphs = net_of(spec), tables_of(spec), FakeGraphs(allocates=True)
    x, carry = make_inputs(TWICE, batch=3, tokens=TOKENS, hidden=WIDTH, dtype=torch.float32)
    with triton_on_cpu("library", slice=2, capture=graphs):
        for seed in (0, 1, 0):
            beside = beside_of(net, 3, seed)
            for start in (0, 1):
                how = dict(start_from=start, stop_after=start + 1, **beside)
                got = library(net, x, carry, cos_sin, TWICE, **how)
                span = cos_sin, start, start + 1
                want = reference.run(TWICE, {"L": net}, x, carry, *span, **beside)["z"]
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert graphs.captures == (1 if name == "padding" else 2)


def test_with_gradient_draws_and_masks_are_the_same() -> None:
    """Of the calls before a window, and of those in it."""
    spec = BlockSpec(**{**MORE["padding"], **_DROPS, "hidden": WIDTH, "num_heads": 2})
    net, cos_sin, schedule = net_of(spec), tables_of(spec), dataclasses.replace(TWICE, grad_from=1)
    for weight in net.weights:
        weight.requires_grad_()
    x, carry = make_inputs(TWICE, batch=2, tokens=TOKENS, hidden=WIDTH, dtype=torch.float32)
    with triton_on_cpu("library"):
        window = backends.get("triton/library").window(problem_for(schedule, {"L": net}, x))
        assert window is not None
        how, grads = dict(cos_sin=cos_sin, **beside_of(net)), []
        for name in ("triton/library", "eager"):
            out = recurx.recurse(schedule, {"L": net}, x, carry, backend=name, **how)["z"]
            grads.append(torch.autograd.grad(out.square().sum(), net.weights))
    for pair in zip(*grads, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-3)


def convolved_alike(depthwise: Any) -> float:
    """Of a convolution in bf16 of fp32 values the share that has the bits of the reference."""
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=draw) for shape in ((3, TOKENS, 80), (80, 1, 3), (80,))
    )
    got = depthwise(x, weight, bias, dtype=torch.bfloat16)
    want = reference.depthwise(x.bfloat16(), {"conv": weight, "conv_bias": bias})
    assert got.dtype == want.dtype
    return (got == want).float().mean().item()


@pytest.mark.parametrize(
    "operand",
    [
        "x, (rows + (k - K // 2)) * STRIDE + cols, there",
        "weight, cols * K + k, cols < C",
        "bias, cols, cols < C",
    ],
)
def test_a_convolution_rounds_as_the_reference(operand: str, tmp_path) -> None:
    """Each operand before it multiplies; sums of fp32 may fall on the other side of a tie."""
    from recurx.kernels.middles import depthwise

    bug = f"_rounded({operand}, dtype)", f"_load({operand})"
    with triton_on_cpu():
        assert convolved_alike(depthwise) > 0.999
        assert convolved_alike(planted("middles", *bug, tmp_path).depthwise) < 0.99


def test_what_follows_a_convolution_is_in_its_dtype(monkeypatch) -> None:
    """As in the reference, whose product takes the dtype of its input."""
    from recurx.kernels import sublayers

    seen, multiply = [], sublayers.multiply

    def noting(x: torch.Tensor, *rest: Any, **how: Any) -> torch.Tensor:
        seen.append(x.dtype)
        return multiply(x, *rest, **how)

    monkeypatch.setattr(sublayers, "multiply", noting)
    spec = spec_of("URM")
    x, carry = make_inputs(ONE, batch=2, tokens=TOKENS, hidden=WIDTH, dtype=torch.float32)
    with triton_on_cpu("library"):
        library(net_of(spec), x, carry, tables_of(spec))
    assert seen == [torch.float32] * 3 + [torch.bfloat16]


@pytest.mark.parametrize("change, said", [
    ({"conv": 2, "conv_dtype": "float32"}, "conv_dtype"),
    ({"head_size": 48}, "head_dim"), ({"inner_norm": "rms", "inner": 4100}, "inner_norm"),
])  # fmt: skip
def test_other_fields_and_values_are_refused_by_name(change: dict, said: str) -> None:
    spec = dataclasses.replace(spec_of("ConvSwiGLU"), **{"conv": 0, **change})
    x, _ = make_inputs(ONE, batch=2, tokens=TOKENS, hidden=WIDTH, dtype=torch.bfloat16)
    problem = problem_for(ONE, {"L": net_of(spec)}, x)
    with triton_on_cpu():
        assert said in str(backends.why_not("triton/library", problem))
        assert backends.get("triton").plan(problem, x.device).kind == "graph"
        for kind in ("tiled", "persistent"):
            assert "of block 0 of net 'L'" in str(backends.why_not(f"triton/{kind}", problem))


LEARNED = Schedule((
    Step("L", "z", ("z",), ("x",), damping="alpha", scale="beta"),
    Step("L", "y", ("z", "y"), damping="alpha", noise=0.1),
    Step("L", "z", ("z", "y"), scale="beta", damping=0.5),
))  # fmt: skip


def learned(kind: str, dtype: torch.dtype) -> None:
    """Each call against fp64, from the states of the one before; then with other factors: nothing
    of the first ones was kept."""
    x, start = make_inputs(LEARNED, batch=3, tokens=TOKENS, hidden=WIDTH, dtype=dtype)
    net = rounded(net_of(spec_of("no mixer, ReLU²")), dtype, torch.float32)
    draw = torch.Generator().manual_seed(0)
    shape = () if kind == "a number" else (WIDTH,)
    factors = {
        "alpha": torch.rand(shape, generator=draw), "beta": 1 + torch.rand(shape, generator=draw)
    }  # fmt: skip

    def said(to: torch.dtype, carry: dict, call: int, backend: str = "eager") -> dict:
        held = {"L": Net(net.spec, [w.to(to) for w in net.weights]), **factors}
        inputs = x.to(to), {name: state.to(to) for name, state in carry.items()}
        how = dict(seed=5, backend=backend)
        return recurx.recurse(LEARNED, held, *inputs, start_from=call, stop_after=call + 1, **how)

    for carry in (start, start):
        for call, step in enumerate(LEARNED.steps):
            exact, plain, got = (
                said(*how)
                for how in ((torch.float64, carry, call), (dtype, carry, call),
                            (dtype, carry, call, "triton/library"))
            )  # fmt: skip
            assert_as_exact(got[step.write], plain[step.write], exact[step.write])
            carry = plain
        for factor in factors.values():
            factor.add_(0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["a number", "a channel"])
def test_learned_factors(kind: str, dtype: torch.dtype) -> None:
    with triton_on_cpu("library", slice=2):
        learned(kind, dtype)


LEARNED_BUGS = {
    "a damping that is not read": ("finish", "if share is not None:", "if False:"),
    "the damping of the first channel": ("finish", "learned(share, D, COLS)", "tl.load(share)"),
    "old and new change places": ("finish", "(1.0 - new) * old", "new * old"),
    "a scale that is not read": ("inject", "if each is not None:", "if False:"),
    "the scale of the first channel": ("inject", "learned(scale, D, COLS)", "tl.load(scale)"),
}


@pytest.mark.parametrize("bug", LEARNED_BUGS)
def test_planted_bugs_of_learned_factors_are_rejected(bug: str, monkeypatch, tmp_path) -> None:
    from recurx.kernels import library, tiled

    mutant = planted(*LEARNED_BUGS[bug], tmp_path)
    for place, name in ((tiled, "finish_call"), (library, "form_call_input")):
        if getattr(getattr(mutant, name, None), "__module__", "") == mutant.__name__:
            monkeypatch.setattr(place, name, getattr(mutant, name))
    with triton_on_cpu("library"), pytest.raises(AssertionError, match="relative error"):
        learned("a channel", torch.bfloat16)


def test_a_learned_factor_is_no_constant_of_a_recording() -> None:
    """Nor of a program: the same steps with the number that stands for it are other calls."""
    step = ONE.steps[0]
    x, carry = make_inputs(ONE, batch=1, tokens=TOKENS, hidden=WIDTH, dtype=torch.float32)
    held = {"L": net_of(spec_of("sigmoid")), "alpha": torch.tensor(0.7)}
    with triton_on_cpu("library", capture=FakeGraphs(allocates=True)):
        for factors in ({"damping": "alpha", "scale": 0.5}, {"damping": 0.5, "scale": "alpha"}) * 2:
            schedule = Schedule((dataclasses.replace(step, **factors),))
            got, want = (
                recurx.recurse(schedule, held, x, carry, backend=backend)["z"]
                for backend in ("triton/library", "eager")
            )
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# module of kernels/, what a bug is put in the place of, the bug, a variant that must show it
BUGS = {
    "activation": ("pointwise", "tl.where(x < 0.0, 0.0, x * x)", "tl.where(x < 0.0, 0.0, x)",
                   "no mixer, ReLU²"),
    "gated": ("sublayers", "gated=spec.gated, bias", "gated=True, bias", "pre-LayerNorm, ReLU"),
    "biases": ("pointwise", "gate += _load(bias", "gate += 0 * _load(bias", "post-LayerNorm, GELU"),
    "biases over T": ("pointwise", "_load(bias + WIDTH // EACH,", "_load(bias,",
                      "token MLP, pre-norm, biases"),
    "biases of tokens": ("pointwise", "tl.load(bias + rows % R)", "tl.load(bias + 0 * rows)",
                         "token MLP over D, biases"),
    "biases of products": ("sublayers", 'bias=w.get("qkv_bias")', "bias=None",
                           "post-LayerNorm, GELU"),
    "residual_scale": ("pointwise", "(branch, FACTOR,", "(branch, 1.0,", "scalar scales"),
    "learned_scale": ("pointwise", "FACTOR, learned,", "FACTOR, None,", "channel scales"),
    "skip_scale": ("pointwise", "(x, SKIP,", "(x, 1.0,", "constant skips"),
    "learned_skip": ("pointwise", "SKIP, skip,", "SKIP, None,", "channel skips"),
    "a scalar": ("pointwise", "x *= tl.load(learned)", "x *= 1.0 + 0.0 * tl.load(learned)",
                 "scalar skips"),
    "kv_heads": ("attention", "head // (H // KV)", "head % KV", "grouped heads, gate, prefix"),
    "mask": ("attention", "(j <= i)", "(j < i)", "causal window, QK-norm"),
    "prefix": ("attention", "| (j < PREFIX)", "| (j < 0)", "grouped heads, gate, prefix"),
    "window": ("attention", "< WINDOW", "<= WINDOW", "plain QK-norm, window"),
    "norm": ("pointwise", "x - (tl.sum(x, 1) / N)[:, None]", "x", "post-LayerNorm, GELU"),
    "norm_weight": ("pointwise", "x *= _load(weight", "x *= 1.0 + 0.0 * _load(weight",
                    "norm weights"),
    "norm_bias": ("pointwise", "x * factor[:, None], weight, shift", "x * factor[:, None], weight, "
                  "None", "norm weights"),
    "placement pre": ("sublayers", "out = made = h if last else h.new_empty(h.shape)",
                      "out = made = h", "pre-LayerNorm, ReLU"),
    "placement sandwich": ("sublayers", 'f"out_norm{half.number}"', 'f"norm{half.number}"',
                           "sandwich"),
    "attn_gate": ("attention", "mixed *= tl.sigmoid(", "mixed *= 1.0 + 0.0 * tl.sigmoid(",
                  "grouped heads, gate, prefix"),
    "qk_norm": ("attention", "low, high = low * factor, high * factor", "low *= factor",
                "plain QK-norm, window"),
    "qk_norm_weight": ("attention", "if weight is not None:", "if weight is None:",
                       "causal window, QK-norm"),
    "attn_norm": ("sublayers", "if spec.attn_norm:", "if False:", "norm of the product"),
    "inner_norm": ("middles", "x = centred(x, inside, N, KIND)", "x = x", "inner norm, GEGLU"),
    "inner_norm_of": ("middles", "y *= tl.sigmoid(gate)", "y *= tl.sigmoid(x)",
                      "norm of the product"),
    "inner_norm_tokens": ("middles", "+ wide % R + cols * R", "+ wide % R * N + cols",
                          "token MLP, inner norms"),
    "dropout": ("pointwise", "element, use, ELEMENTS)", "element, use + 4, ELEMENTS)",
                "dropout, sandwich"),
    "drop_path": ("pointwise", "0 * entry, use + 4", "element, use + 4", "paths, pre-norm"),
    "what stays grows": ("pointwise", "x *= GROWN", "x *= 1.0", "dropout, sandwich"),
    "draws of a sample": ("pointwise", "+ tl.load(stream + 1)", "+ 0 * tl.load(stream + 1)",
                          "paths, pre-norm"),
    "draws of an element": ("pointwise", "(rows % R)[:, None] * N +", "(rows % R)[:, None] +",
                            "token MLP, dropping"),
    "draws of a call": ("library", "call += 1", "call += 0", "paths, pre-norm"),
    "draws of a span": ("library", "span.start, like", "0, like",
                        "paths, pre-norm"),
    "draws of a block": ("sublayers", "2 * int(half.number)", "2", "token MLP over D, dropping"),
    "key_padding": ("attention", "sees & (padding[None, :] == 0)", "sees", "padding"),
    "rows that see none": ("attention", "(total[:, None] == 0.0, 0.0,", "(False, 0.0,",
                           "padding, masks, gate"),
    "padding and masks": ("attention", 'else float("-inf")', "else -1e30", "padding, masks, gate"),
    "masks of slices": ("library", "operands.key_mask[live]", "operands.key_mask[:1]", "padding"),
    "axial": ("attention", "heads.axial and not heads.axial[2]", "False", "axial, columns"),
    "lines of a sample": ("attention", "+ batch % LINES", "", "axial, columns"),
    "lines of padding": ("attention", "unseen + first + LINES * keys", "unseen + first + keys",
                         "columns, padding, gate"),
    "lines of a gate": ("attention", "rows, e, OUT_STRIDE", "rows, e, H * HEAD_DIM",
                        "columns, padding, gate"),
    "words of a quad": ("noise", "tl.where(odd, d, c)", "tl.where(odd, c, d)", "dropout, sandwich"),
    "conv": ("middles", "(k - K // 2)", "(k - (K - 1) // 2)", "ConvSwiGLU"),
    "conv_of": ("sublayers", "inside and spec.conv and not early", "False", "ConvSwiGLU"),
}  # fmt: skip


@pytest.mark.parametrize("field", BUGS)
def test_planted_bugs_are_rejected(field: str, monkeypatch, tmp_path) -> None:
    from recurx.kernels import library as way
    from recurx.kernels import pointwise, sublayers

    module, old, new, name = BUGS[field]
    mutant = planted(module, old, new, tmp_path)
    place = {"sublayers": way, "library": way, "noise": pointwise}.get(module, sublayers)
    names = "run_call", "add_norm", "swiglu", "attention", "gated_norm", "depthwise"
    for each in (*names, "kept", "LibrarySlice"):
        if getattr(getattr(mutant, each, None), "__module__", "") == mutant.__name__:
            monkeypatch.setattr(place, each, getattr(mutant, each))
    with triton_on_cpu("library"), pytest.raises(AssertionError, match="relative error"):
        spec = spec_of(name)
        judged(net_of(spec, seed=1), tables_of(spec), torch.bfloat16)


def test_every_field_has_a_variant_that_has_it() -> None:
    seen = {field for name in NAMES for field in spec_of(name).changed}
    assert seen | {"learned factors"} == FIELDS["library"]
