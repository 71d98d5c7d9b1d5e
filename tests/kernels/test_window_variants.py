"""Gradient windows of blocks with other fields than TRM's, in kind "library" of "triton"."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")
from mutants import planted
from recurx.kernels.fields import FIELDS, UNTRAINED
from simulate import triton_on_cpu
from test_library_variants import NAMES, ONE, TOKENS, WIDTH, beside_of, spec_of, stack
from window_gradients import assert_close, gradients_of, loss_of, on_triton

import recurx
from recurx import Net, Schedule, backends, ops
from recurx.backends import triton_window
from recurx.problem import encode
from tests.factories import make_inputs, problem_for, rounded
from tests.variants import net_of, tables_of

WAY = "triton/library"
SAVE = ("all", "block", "states")
BF16, FP32 = torch.bfloat16, torch.float32
TWO = Schedule.trm(1, 1)
TRAINED = [name for name in NAMES if not UNTRAINED & {*spec_of(name).changed}]


def given(*names: str, schedule=ONE, dtype=FP32, batch=2, seed=1) -> tuple:
    specs = [spec_of(name) for name in names]
    return problem(net_of(*specs, seed=seed), tables_of(specs[0]), schedule, dtype, batch)


def problem(net: Net, cos_sin, schedule=ONE, dtype=FP32, batch=2) -> tuple:
    nets = {name: rounded(net, dtype, FP32) for name in schedule.nets}
    sizes = dict(batch=batch, tokens=TOKENS, hidden=net.spec.hidden, dtype=dtype)
    return schedule, nets, *make_inputs(schedule, **sizes), cos_sin


def judge(case: tuple, save: str = "all") -> None:
    *arguments, cos_sin = case
    beside = beside_of(arguments[1]["L"], len(arguments[2]))
    with triton_on_cpu():
        assert backends.get(WAY).window(problem_for(*arguments[:3])) is not None
        got = gradients_of(on_triton(cos_sin, save, WAY, **beside), *arguments)
    assert_close(got, *arguments, cos_sin, **beside)


@pytest.mark.parametrize("name", [name for name in TRAINED if not spec_of(name).conv_dtype])
def test_gradients_in_fp32(name):
    judge(given(name, name))


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_gradients_in_bf16(name):
    judge(given(name, name, dtype=BF16, batch=4))


def test_gradients_of_a_stack_that_ends_in_a_norm():
    judge(problem(*stack()))


@pytest.mark.parametrize("name, change, batch", [
    ("post-LayerNorm, GELU", dict(hidden=96, num_heads=3, inner=20), 3),
    ("inner norm, GEGLU", dict(hidden=96, num_heads=3, inner=20), 3),
    ("token MLP over D, biases", {}, 0), ("grouped heads, gate, prefix", {}, 0),
    ("ConvSwiGLU", {}, 0),
])  # fmt: skip
def test_rows_that_fill_no_tile_and_an_empty_batch(name, change, batch):
    spec = dataclasses.replace(spec_of(name), **change)
    judge(problem(net_of(spec, seed=1), tables_of(spec), batch=batch))


@pytest.mark.parametrize("name", ["norm weights", "dropout, sandwich"])
def test_gradients_through_the_calls_of_a_window(name):
    judge(given(name, schedule=TWO), "states")


@pytest.mark.parametrize("name", ["ConvSwiGLU", "token MLP, pre-norm, biases"])
def test_what_is_kept_changes_no_bit_and_neither_does_a_rerun(name):
    *arguments, cos_sin = given(name, schedule=TWO, dtype=BF16)
    with triton_on_cpu():
        runs = [gradients_of(on_triton(cos_sin, save, WAY), *arguments) for save in (*SAVE, "all")]
    for other in runs[1:]:
        for name in runs[0]:
            assert torch.equal(runs[0][name], other[name]), f"gradient of {name}"


def test_a_call_keeps_its_input_alone():
    schedule, nets, x, *_ = given("sandwich", schedule=TWO)
    with triton_on_cpu():
        asked = problem_for(schedule, nets, x)
        window = backends.get(WAY).window(asked)
        span = triton_window.Span(0, 2)
        all_of, block, states = (window.kept(asked, span, save) for save in SAVE)
    assert all_of == block == [((2, *x.shape), FP32)] and states == []


@pytest.mark.parametrize("save", ["block", "states"])
def test_opcheck(save):
    schedule, nets, x, carry, cos_sin = given("sandwich")
    weights = [w.requires_grad_() for w in nets["L"].weights]
    how = None, None, encode(schedule, [("L", nets["L"].spec)]), WAY, WAY, 0, 1, save
    inputs = x.requires_grad_(), list(carry.values()), weights, *cos_sin, *how
    tests = "test_schema", "test_autograd_registration", "test_faketensor"
    with triton_on_cpu():
        torch.library.opcheck(ops.window_op, inputs, test_utils=tests)


def test_only_what_is_asked_for_is_computed():
    schedule, nets, x, carry, cos_sin = given("norm weights")
    x.requires_grad_()
    with triton_on_cpu():
        out = recurx.recurse(schedule, nets, x, carry, backend=WAY, cos_sin=cos_sin)
        with (
            mock.patch("recurx.kernels.library.product_in_fp32", side_effect=AssertionError),
            mock.patch("recurx.kernels.pointwise_backward.new_sums", side_effect=AssertionError),
        ):
            (got,) = torch.autograd.grad(loss_of(out), x)
        want = gradients_of(on_triton(cos_sin, way=WAY), schedule, nets, x, carry)["x"]
    assert torch.equal(got, want)


@pytest.mark.parametrize("change", [
    {"axial": (3, 4, 0)}, {"conv": 2, "conv_dtype": "bfloat16"}, {"head_size": 48},
], ids=str)  # fmt: skip
def test_other_fields_have_no_window(change):
    """So PyTorch runs it; kind "tiled" has none for any field."""
    spec = dataclasses.replace(spec_of("ConvSwiGLU"), **{"conv": 0, **change})
    plain, _ = make_inputs(ONE, batch=2, tokens=TOKENS, hidden=WIDTH)
    with triton_on_cpu():
        for name in ("triton", WAY):
            assert backends.get(name).window(problem_for(ONE, {"L": net_of(spec)}, plain)) is None
        known = problem_for(ONE, {"L": net_of(spec_of("ConvSwiGLU"))}, plain)
        assert backends.get("triton").window(known) is not None
        assert backends.get("triton/tiled").window(known) is None


def test_every_field_is_trained_or_refused():
    seen = {field for name in NAMES for field in spec_of(name).changed} - UNTRAINED
    assert seen == FIELDS["library"] - UNTRAINED


# module of kernels/, what a bug is put in the place of, the bug, a variant that must show it
BUGS = {
    "rms": ("pointwise_backward", "d - hat * (tl.sum(d * hat, 1) / N)[:, None]", "d", "ConvSwiGLU"),
    "layer": ("pointwise_backward", "result -= (tl.sum(d, 1)", "result -= 0 * (tl.sum(d, 1)",
              "post-LayerNorm, GELU"),
    "norm_weight": ("pointwise_backward", "affine(d, weight, None, N, COLS), x,", "d, x,",
                    "norm weights"),
    "gradient of norm_weight": ("pointwise_backward", "(d_weight, d * x,", "(d_weight, d,",
                                "norm weights"),
    "gradient of norm_bias": ("pointwise_backward", "(d_shift, d,", "(d_shift, d * x,",
                              "norm weights"),
    "sandwich": ("pointwise_backward", "d = norm_backward(d, hat, before_factor,",
                 "d = norm_backward(d, 0 * hat, before_factor,", "sandwich"),
    "weight before": ("pointwise_backward", "d = affine(d, before_weight, None, N, COLS)", "d = d",
                      "sandwich"),
    "gradient of a weight before": ("pointwise_backward", "(d_before_weight, d * hat,",
                                    "(d_before_weight, d,", "sandwich"),
    "residual sum": ("pointwise_backward", "d += _load(d_total", "d += 0 * _load(d_total",
                     "pre-LayerNorm, ReLU"),
    "biases of tokens": ("pointwise_backward", "tl.load(bias + rows % R)",
                         "tl.load(bias + 0 * rows)", "token MLP over D, biases"),
    "residual_scale": ("pointwise_backward", "d = times(d, FACTOR,", "d = times(d, 1.0,",
                       "scalar scales"),
    "learned_scale": ("pointwise_backward", "(d, FACTOR, learned,", "(d, FACTOR, None,",
                      "channel scales"),
    "gradient of learned_scale": ("pointwise_backward", "d * branch * FACTOR", "d * branch",
                                  "scalar scales"),
    "skip_scale": ("pointwise_backward", "times(d, SKIP,", "times(d, 1.0,", "constant skips"),
    "learned_skip": ("pointwise_backward", "(d, SKIP, skip,", "(d, SKIP, None,", "channel skips"),
    "gradient of learned_skip": ("pointwise_backward", "d * entered * SKIP", "d * entered",
                                 "scalar skips"),
    "attn_gate": ("pointwise_backward", "shut = 1.0 - tl.sigmoid(", "shut = tl.sigmoid(",
                  "grouped heads, gate, prefix"),
    "silu": ("middles_backward", "s * (1.0 + x * (1.0 - s))", "s", "norm weights"),
    "gelu": ("middles_backward", "+ x * density", "", "post-LayerNorm, GELU"),
    "gelu_tanh": ("middles_backward", "0.134145", "0.044715", "inner norm, GEGLU"),
    "relu": ("middles_backward", "0.0, 1.0)", "1.0, 1.0)", "pre-LayerNorm, ReLU"),
    "relu2": ("middles_backward", "2.0 * x", "x", "no mixer, ReLU²"),
    "sigmoid": ("middles_backward", "y = s * (1.0 - s)", "y = s", "sigmoid"),
    "up": ("middles_backward", "middle * up, d_gate * up", "middle * up, d_gate", "norm weights"),
    "biases": ("middles_backward", "gate += _load(bias", "gate += 0 * _load(bias",
               "post-LayerNorm, GELU"),
    "inner norm": ("middles_backward", "d = norm_backward(affine(d, weight, None, N, COLS), x,",
                   "d = norm_backward(affine(d, weight, None, N, COLS), 0 * x,",
                   "norm of the product"),
    "gradient of inner_norm_weight": ("middles_backward", "leave_sum(d_weight, d * x",
                                      "leave_sum(d_weight, d", "norm of the product"),
    "inner_norm_of": ("middles_backward", "d += d_opened", "d += 0 * d_opened",
                      "norm of the product"),
    "inner_norm_tokens": ("middles_backward", "place = wide // R * (N * R) + wide % R + cols * R",
                          "place = wide // R * (N * R) + wide % R * N + cols",
                          "token MLP, inner norms"),
    "conv": ("middles_backward", "reader = token - (k - K // 2)",
             "reader = token + (k - K // 2)", "ConvSwiGLU"),
    "gradient of conv": ("middles_backward", "tl.sum(d * value, 0)", "tl.sum(value, 0)",
                         "convolution before the gate"),
    "conv's activation": ("middles_backward", "d *= slope(total", "d *= 1.0 + 0 * slope(total",
                          "ConvSwiGLU"),
    "mask": ("attention_backward", "if CAUSAL or WINDOW:", "if WINDOW:",
             "grouped heads, gate, prefix"),
    "window": ("attention_backward", "CAUSAL, PREFIX, WINDOW)", "CAUSAL, PREFIX, 0)",
               "plain QK-norm, window"),
    "kv_heads": ("attention_backward", "(H + head // (H // KV))", "(H + head % KV)",
                 "grouped heads, gate, prefix"),
    "gate of heads": ("attention_backward", "* tl.sigmoid(logits)", "", "grouped heads, gate, "
                      "prefix"),
    "along what the gate let out": ("attention_backward", "d_given.to(tl.float32)",
                                    "d_mixed.to(tl.float32)", "grouped heads, gate, prefix"),
    "norm of k": ("attention_backward", "NORM, EPS, k_norm", '"", EPS, k_norm',
                  "causal window, QK-norm"),
    "key_padding": ("attention_backward", "padding[:, None] == 0", "padding[:, None] >= 0",
                    "padding"),
    "padding of another sample": ("attention_backward", "unseen + batch * T + keys",
                                  "unseen + keys", "padding"),
    "dropout, drop_path": ("pointwise_backward", "d = dropped(d,", "dropped(d,",
                           "paths, pre-norm"),
    "drops of the sum that has a norm": ("pointwise_backward", "added = dropped(added,",
                                         "dropped(added,", "token MLP, dropping"),
    "draws of another call": ("sublayers_training", "beside=beside._replace(",
                              "beside=beside._replace(call=7, ", "dropout, sandwich"),
    "draws of another block": ("sublayers_training", "block=h.beside.block", "block=0",
                               "dropout, sandwich"),
    "qk_norm": ("sublayers_training", "if spec.qk_norm:", "if False:", "plain QK-norm, window"),
    "attn_norm": ("sublayers_training", "if spec.attn_norm:", "if False:", "norm of the product"),
    "the gate's product": ("sublayers_training", "d_x.add_(multiply(d_gate", "(multiply(d_gate",
                           "grouped heads, gate, prefix"),
    "calls overwrite each other": ("sublayers_training", "seen.add_(total)", "total",
                                   "norm weights"),
    "weights of another block": ("sublayers_training", "first += len(index)", "first += 0",
                                 "norm weights"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_rejected(bug, monkeypatch, tmp_path):
    from recurx.kernels import middles_backward, sublayers_training

    module, old, new, name = BUGS[bug]
    mutant = planted(module, old, new, tmp_path)
    if module == "sublayers_training":
        monkeypatch.setattr(triton_window, module, mutant)
    else:
        for place in (sublayers_training, middles_backward):
            for each in dir(mutant):
                own = getattr(getattr(mutant, each), "__module__", "") == mutant.__name__
                if own and hasattr(place, each):
                    monkeypatch.setattr(place, each, getattr(mutant, each))
    names = [name] * (2 if "another block" in bug else 1)
    schedule = TWO if bug == "calls overwrite each other" else ONE
    with pytest.raises(AssertionError, match="gradient"):
        judge(given(*names, schedule=schedule))
