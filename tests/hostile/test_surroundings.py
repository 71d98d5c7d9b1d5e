"""What stands around a net, or in place of PyTorch's own functions, and changes what it computes.

Each row is done to a patched model and to its twin; the answer is the twin's, or a refusal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import recurx
from recurx.errors import RecurxError
from recurx.patching.probe import undisturbed
from tests import lookalike
from tests.hostile.test_corpus import CLOSE, distance, quiet, trained


class Settled(lookalike.Inner):
    """An inner model with a setting of its own, in the instance, the class and the file."""

    out_scale = 1.0

    def forward(self, carry: Any, batch: Any) -> Any:
        new, logits, q = super().forward(carry, batch)
        return new, scaled(logits) * self.out_scale, q


def scaled(logits: Tensor) -> Tensor:
    return logits * FILE_SETTINGS["scale"]


FILE_SETTINGS = {"scale": 1.0}


class Masked(lookalike.Inner):
    def forward(self, carry: Any, batch: Any) -> Any:
        new, logits, q = super().forward(carry, batch)
        return new, logits * batch["mask"] if "mask" in batch else logits, q


class Quantised(Tensor):
    """A weight that is halved where a linear layer reads it."""

    @classmethod
    def __torch_function__(cls, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if f in (F.linear, Tensor.to):
            with torch._C.DisableTorchFunctionSubclass():
                plain = [a.as_subclass(Tensor) * 0.5 if isinstance(a, cls) else a for a in args]
                return f(*plain, **(kwargs or {}))
        return super().__torch_function__(f, types, args, kwargs or {})


class Halving(TorchDispatchMode):
    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = f(*args, **(kwargs or {}))
        return out * 0.5 if "aten.mm" in str(f) else out


class HalvingSilu(TorchFunctionMode):
    def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = f(*args, **(kwargs or {}))
        return out * 0.5 if f is F.silu else out


@contextlib.contextmanager
def put(owner: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patching:
        if isinstance(owner, dict):
            patching.setitem(owner, name, value)
        else:
            patching.setattr(owner, name, value)
        yield


def settled(kind: type = Settled) -> nn.Module:
    model: Any = lookalike.build()
    model.model.inner.__class__ = kind
    return model


def calls_halved(model: Any) -> None:
    inner, own = model.model.inner, model.model.inner._calls
    inner._calls = lambda z, x, info: own(z, 0.5 * x, info)


def quantised_weight(model: Any) -> None:
    linear = model.model.inner.L_level.layers[0].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised))


def starts_with_gradient(model: Any) -> None:
    """One cycle: every call is in the window, and gradient reaches the entering states."""
    inner, own = model.model.inner, model.forward
    inner.config.H_cycles = 1
    inner.boost = nn.Parameter(torch.ones(32))

    def forward(carry: Any, batch: Any) -> Any:
        states = {name: state * inner.boost for name, state in vars(carry).items()}
        return own(type(carry)(**states), batch)

    model.forward = forward


def quirk(name: str) -> Callable[[Any], None]:
    return lambda model: setattr(model.model.inner.config, "quirks", frozenset({name}))


def scale_set(model: Any) -> None:
    model.model.inner.out_scale = 2


def rope_deleted(model: Any) -> None:
    del model.model.inner.rotary_emb


def spectral(model: Any) -> None:
    torch.manual_seed(4)
    linear = model.model.inner.L_level.layers[0].mlp.down_proj
    nn.utils.parametrizations.spectral_norm(linear)


def nothing(model: Any) -> None:
    pass


attend, linear, call = F.scaled_dot_product_attention, F.linear, nn.Module._call_impl
# name: (how to build, what is done to the model, what is done around the step)
ROWS: dict[str, tuple[Callable[[], Any], Callable[[Any], None], Callable[[], Any]]] = {
    name: (build, edit, around)  # type: ignore[misc]
    for name, build, edit, around in (
        ("another window in the settings", lookalike.build, quirk("window"), None),
        ("an attribute of the instance", settled, scale_set, None),
        ("an attribute of the class", settled, nothing, lambda: put(Settled, "out_scale", 0.5)),
        ("a setting of the file", settled, nothing, lambda: put(FILE_SETTINGS, "scale", 0.5)),
        ("a method in the instance", lookalike.build, calls_halved, None),
        ("a weight of a subclass", lookalike.build, quantised_weight, None),
        ("a spectral norm", lookalike.build, spectral, None),
        ("gradient into the starts", lookalike.build, starts_with_gradient, None),
        ("no rotary tables", lookalike.build, rope_deleted, None),
        ("a dispatch mode", lookalike.build, nothing, Halving),
        ("a function mode", lookalike.build, nothing, HalvingSilu),
        ("another attention in torch", lookalike.build, nothing, lambda: put(
            F, "scaled_dot_product_attention", lambda *qkv, **_: attend(*qkv, is_causal=True))),
        ("another activation in torch", lookalike.build, nothing, lambda: put(F, "silu", F.gelu)),
        ("another product in torch", lookalike.build, nothing, lambda: put(
            F, "linear", lambda x, w, b=None: 0.5 * linear(x, w, b))),
        ("another root in torch", lookalike.build, nothing, lambda: put(
            torch, "rsqrt", lambda x: 1 / (x.sqrt() + 0.1))),
        ("another call of all modules", lookalike.build, nothing, lambda: put(
            nn.Module, "__call__", lambda self, *a, **k: call(self, *a, **k) * (
                0.5 if isinstance(self, lookalike.Gated) else 1))),
    )
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend", ["cpu", "auto"])
@pytest.mark.parametrize("row", ROWS)
def test_what_is_done_around_a_patched_model(row: str, backend: str, training: bool) -> None:
    build, edit, around = ROWS[row]
    ours, twin = build().train(training), build().train(training)
    plain = trained(twin)
    recurx.patch(ours, backend=backend)
    assert distance(trained(ours), plain)[0] < CLOSE
    for model in (ours, twin):
        edit(model)
    with around() if around else contextlib.nullcontext():
        try:
            want = trained(twin)
        except TypeError:  # this model cannot run so at all: neither may ours
            with pytest.raises((TypeError, RecurxError)), quiet():
                trained(ours)
            return
        if want.keys() == plain.keys() and (training or "window" not in row):
            assert distance(want, plain)[0] > CLOSE or "gradient" in row, "the row changes nothing"
        with quiet():
            try:
                got = trained(ours)
            except RecurxError as error:
                assert "`" in str(error), "it names nothing"
                return
    found, where = distance(got, want)
    assert found < CLOSE, f"{backend}, {row}: {where} is {found:.2g} from the model's own"


def test_a_batch_that_is_asked_for_more_is_refused() -> None:
    with pytest.raises(RecurxError, match=r"looks for \['mask'\] in a batch"):
        recurx.patch(settled(Masked))


def test_a_patch_leaves_running_means_as_they_were() -> None:
    model: Any = lookalike.build()
    norm = model.model.inner.lm_head = nn.Sequential(model.model.inner.lm_head, nn.BatchNorm1d(10))
    with undisturbed(model, True):
        norm(torch.randn(3, 10, 32))
    assert not norm[1].running_mean.any() and not norm[1].num_batches_tracked
