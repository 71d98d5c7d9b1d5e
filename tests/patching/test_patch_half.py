"""Models that were cast as a whole, rotary tables too: taken, and wrong tables still refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recurx
from recurx import UnsupportedModel
from recurx.patching import sharded
from tests import lookalike, lookalike_nano
from tests.patching.test_patch import inner_of, same, step


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("forward", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", ["trm", "hrm", "hier6"])
def test_models_that_were_cast_are_taken(cast: torch.dtype, forward: str, variant: str) -> None:
    cycles = {"L_cycles": 6} if variant == "hier6" else {}
    model = lookalike.build(variant, forward_dtype=forward, **cycles).to(cast)
    report = str(recurx.patch(model).report)
    assert "logits and carry bit-identical" in report
    assert f"does not round q and k to its tables' {str(cast)[6:]}" in report
    # fp16 starts in a carry of another dtype make fp32 states; only fp16 alone has no engine
    alone = cast == torch.float16 and forward == "float16"
    fused = recurx.backends.why_not("cpu", _problem(model)) is None
    assert fused != alone
    assert ("auto -> eager" in report) == alone


def _problem(model: nn.Module) -> Any:
    from recurx.patching.official import Official

    inner = inner_of(model)
    return Official().problem(inner, Official().recipe(inner, "auto"))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_training_in_half_precision_has_the_same_bits(cast: torch.dtype) -> None:
    """States as narrow as the tables: the original rounds nothing that recurx does not."""
    model = lookalike.build(forward_dtype=str(cast)[6:]).to(cast)
    want = step(model)
    with recurx.patch(model, backend="eager"):
        same(step(model), want)


def test_mixed_dtypes_sum_as_the_original_does() -> None:
    model = lookalike.build(forward_dtype="bfloat16").half()
    carry, batch = lookalike.inputs(model)
    carry = type(carry)(*(state.float() for state in vars(carry).values()))
    inner_of(model).rotary_emb.float()  # leaves one difference: that of x and the states
    want = model.model(carry, batch)
    with recurx.patch(model, backend="eager"):
        got = model.model(carry, batch)
    assert got[1].dtype == want[1].dtype and torch.equal(got[1], want[1])


def _swapped(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return sin, cos


def _shifted(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return cos.roll(1, 0), sin.roll(1, 0)


def _one_frequency_off(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos = cos.clone()
    cos[:, 0] = cos[:, 1]
    return cos, sin


def _other_base(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    made = recurx.rope_tables(*cos.shape, base=9000.0)
    return made[0].to(cos.dtype), made[1].to(cos.dtype)


@pytest.mark.parametrize("wrong", [_swapped, _shifted, _one_frequency_off, _other_base])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("build", [lookalike.build, lookalike_nano.build])
def test_wrong_tables_are_refused_in_every_dtype(
    wrong: Any, cast: torch.dtype, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = sharded.recurse

    def planted(*args: Any, cos_sin: Any, **kwargs: Any) -> Any:
        return right(*args, cos_sin=wrong(*cos_sin), **kwargs)

    monkeypatch.setattr(sharded, "recurse", planted)
    with pytest.raises(UnsupportedModel, match=r"computes something else|is off by"):
        recurx.patch(build().to(cast))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_code_that_differs_is_refused_after_a_cast_too(cast: torch.dtype) -> None:
    for quirk in ("scaled residual", "window"):
        with pytest.raises(UnsupportedModel, match=r"computes something else|is off by"):
            recurx.patch(lookalike.build(quirks=frozenset({quirk})).to(cast))


def test_official_solve_takes_a_cast_model() -> None:
    from tests import official

    parts = official.load("trm")
    for cast in (torch.bfloat16, torch.float16):
        model = parts["model"](official.config("trm", forward_dtype="bfloat16")).to(cast)
        recurx.solve(model, official.batch(), max_steps=2, backend="cpu")
