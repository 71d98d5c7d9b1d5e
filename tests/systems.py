"""Loads the code of later systems from checkouts that environment variables point to.

    RECURX_OFFICIAL_URM        UbiquantAI/URM        RECURX_OFFICIAL_EQR    locuslab/EqR
    RECURX_OFFICIAL_RSM        navidivan/rsm         RECURX_OFFICIAL_SIC    jvdillon/sic
    RECURX_OFFICIAL_HRM_TEXT   sapientinc/HRM-Text   RECURX_OFFICIAL_PRIML  rekursiv-ai/priml
    RECURX_OFFICIAL_FPRM   nilskiKonjIzDunava/fprm

Each is imported alone and then taken out of `sys.modules`. What they import beyond torch and is not
installed is stood in for, but for configgle, which SIC and priml cannot do without (PyPI). They are
written for a newer Python than ours may be; `_readable` sees to that.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import os
import re
import sys
import typing
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.official import _flash_attn_stand_in

# system -> (modules, folder of the checkout that they are imported from)
SYSTEMS: dict[str, tuple[tuple[str, ...], str]] = {
    "urm": (("models.urm.urm",), ""),
    "eqr": (("models.eqr",), ""),
    "fprm": (("models.fixed_point_reasoning.fprm",), ""),
    "rsm": (("models.recursive_reasoning.rsm",), ""),
    "sic": (("model",), "code"),
    "priml": (
        ("priml.model.transformer", "priml.model.mlpmixer", "priml.model.attention",
         "priml.model.swiglu", "priml.model.norm", "priml.model.sequential"), "",
    ),
    "hrm_text": (("models.transformer",), ""),
}  # fmt: skip


class _Anything:
    """A colour, say: empty text under any name."""

    def __getattr__(self, name: str) -> str:
        return ""


def _module(name: str, **values: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(values)
    return module


def _attended(query: Any, key: Any, value: Any, causal: bool, prefix: int = 0) -> Any:
    """HRM-Text's attention [B, T, H, head_dim]: causal, or all of a prefix and then causal."""
    tokens = query.shape[-3]
    sees = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    sees[:, : 0 if causal else prefix] = True
    groups = query.shape[-2] // key.shape[-2]
    key, value = (t.repeat_interleave(groups, dim=-2) for t in (key, value))
    q, k, v = (t.transpose(-3, -2) for t in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=sees)
    return out.transpose(-3, -2)


def _stand_ins() -> dict[str, ModuleType]:
    nothing = lambda *_, **__: None  # noqa: E731
    plain = lambda function=None, **_: function  # noqa: E731
    flash = _flash_attn_stand_in()
    stats = _module("scipy.stats", gamma=None, expon=None)  # draws numbers of iterations
    found = {
        "scipy": _module("scipy", stats=stats),
        "scipy.stats": stats,
        "flash_attn": flash,
        "flash_attn_interface": _module(
            "flash_attn_interface", flash_attn_with_kvcache=nothing,
            flash_attn_func=flash.flash_attn_func,
        ),
        "colorama": _module("colorama", Fore=_Anything(), Style=_Anything(), init=nothing),
        "jaxtyping": _module("jaxtyping", jaxtyped=lambda *_, **__: plain, Float=_Anything()),
        "typeguard": _module("typeguard", typechecked=plain),
        "models.flash_attention_prefixlm_v2": _module(
            "models.flash_attention_prefixlm_v2", flash_attn_varlen_prefixlm=_attended
        ),
    }  # fmt: skip
    return {name: module for name, module in found.items() if not _installed(name)}


def _installed(name: str) -> bool:
    if name.startswith(("flash_attn", "models.")):
        return False
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
        return True
    return False


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Aliases of the form `type X = ...` and `typing.override`, which Python 3.11 lacks."""
    if sys.version_info >= (3, 12):
        yield
        return
    loader: Any = importlib.machinery.SourceFileLoader
    real, kept = loader.source_to_code, sys.dont_write_bytecode

    def rewritten(self: Any, data: Any, path: Any, **more: Any) -> Any:
        if "priml" in str(path):
            data = re.sub(rb"(?m)^type (\w+) = .*$", rb"\1 = object", bytes(data))
        return real(self, data, path, **more)

    loader.source_to_code, sys.dont_write_bytecode = rewritten, True
    typing.override = lambda function: function  # type: ignore[attr-defined,assignment]
    try:
        yield
    finally:
        loader.source_to_code, sys.dont_write_bytecode = real, kept
        del typing.override  # type: ignore[attr-defined]


def load(system: str) -> dict[str, Any]:
    """All names of the system's modules. Skips the test where there is no checkout of it."""
    variable = f"RECURX_OFFICIAL_{system.upper()}"
    checkout = os.environ.get(variable)
    if not checkout:
        pytest.skip(f"{variable} does not point to a checkout of its code")
    if system in ("sic", "priml"):
        pytest.importorskip("configgle", reason="SIC and priml are configured with it")
    modules, folder = SYSTEMS[system]
    before, found = set(sys.modules), {}
    sys.path.insert(0, os.path.join(checkout, folder))
    try:
        with _readable():
            sys.modules.update(_stand_ins())
            for name in modules:
                found |= vars(importlib.import_module(name))
    finally:
        sys.path.pop(0)
        for name in set(sys.modules) - before:
            if name.split(".")[0] in {"models", "utils", "model", "util", "priml", *_stand_ins()}:
                del sys.modules[name]
    return found
