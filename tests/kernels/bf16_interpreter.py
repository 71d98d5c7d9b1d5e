"""Correct bfloat16 for Triton's interpreter, and a way to interpret jitted kernels.

Triton's interpreter keeps bf16 tensors as their 16-bit patterns and lets numpy compute with the
patterns as if they were integers: a dot, a sum or a comparison of bf16 tensors is silently wrong,
and a cast from float32 truncates. Here a bf16 tensor is a float32 array whose values are rounded to
bf16 (to nearest even, as the hardware does) after every operation; loads and stores convert.

`interpreting()` is the only entry. It fails loudly when the interpreter's internals are not the
ones this file was written for (Triton 3.6 to 3.9), or when its own check gives a wrong number.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

SUPPORTED = ((3, 6), (3, 9))  # first and last minor version whose interpreter was read

# What is replaced, and the first parameters each must have. The trailing parameters of the memory
# operations differ between versions and are passed through.
_EXPECTED = {
    "create_masked_load": ["self", "ptrs", "mask", "other"],
    "create_masked_store": ["self", "ptrs", "value", "mask"],
    "cast_impl": ["self", "src", "dst_type"],
    "create_fp_to_fp": ["self", "src", "dst_type", "rounding_mode"],
    "create_bitcast": ["self", "src", "dst_type"],
    "create_fabs": ["self", "arg"],
    "create_atomic_rmw": ["self", "rmwOp", "ptr", "val"],
    "create_atomic_cas": ["self", "ptr", "cmp", "val"],
}
_BUILDER = interpreter.InterpreterBuilder
_HANDLE = interpreter.TensorHandle


def is_bf16(dtype: Any) -> bool:
    return not isinstance(dtype, tl.pointer_type) and getattr(dtype, "scalar", dtype) == tl.bfloat16


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to the nearest bf16, ties to even; NaN stays NaN."""
    values = np.asarray(values, np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(values), values, rounded.view(np.float32)).reshape(values.shape)


def to_pattern(values: np.ndarray) -> np.ndarray:
    """The 16-bit patterns of bf16 values held as float32."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_pattern(patterns: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(patterns).astype(np.uint32) << 16).view(np.float32)


def check_internals() -> None:
    """Raise if the interpreter is not one this file knows."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not SUPPORTED[0] <= version <= SUPPORTED[1]:
        raise RuntimeError(
            f"bf16_interpreter: triton {triton.__version__} is outside {SUPPORTED}; read its "
            "runtime/interpreter.py, adapt this file, then widen SUPPORTED"
        )
    for name, expected in _EXPECTED.items():
        method = getattr(_BUILDER, name, None)
        found = list(inspect.signature(method).parameters)[: len(expected)] if method else None
        if found != expected:
            raise RuntimeError(
                f"bf16_interpreter: InterpreterBuilder.{name} has parameters {found}, expected "
                f"{expected} (triton {triton.__version__}); adapt this file"
            )
    for name in (
        "_get_np_dtype",
        "_validate_np_data_size",
        "_interpreter",
        "InterpretedFunction",
        "_patch_lang",
    ):
        if not hasattr(interpreter, name):
            raise RuntimeError(f"bf16_interpreter: triton.runtime.interpreter.{name} is gone")
    if interpreter._get_np_dtype(tl.bfloat16) != np.uint16:
        raise RuntimeError("bf16_interpreter: bf16 is no longer held as uint16; is it fixed?")


def _replacements() -> dict[str, Any]:
    """New methods of InterpreterBuilder; each falls back to the original where no bf16 is used."""
    original = {name: getattr(_BUILDER, name) for name in _EXPECTED}

    def create_masked_load(self, ptrs, mask, other, *rest, **options):
        dtype = ptrs.get_element_ty()
        if not is_bf16(dtype):
            return original["create_masked_load"](self, ptrs, mask, other, *rest, **options)
        fill = np.zeros(ptrs.data.shape, np.uint16) if other is None else to_pattern(other.data)
        fill = np.ascontiguousarray(np.broadcast_to(fill, ptrs.data.shape))
        loaded = interpreter._interpreter.load(ptrs.data, mask.data, fill, np.dtype(np.uint16))
        return _HANDLE(from_pattern(loaded), dtype)

    def create_masked_store(self, ptrs, value, mask, *rest, **options):
        if not is_bf16(value.dtype):
            return original["create_masked_store"](self, ptrs, value, mask, *rest, **options)
        return interpreter._interpreter.store(ptrs.data, to_pattern(value.data), mask.data)

    def cast_impl(self, src, dst_type):
        if not (is_bf16(src.dtype) or is_bf16(dst_type)):
            return original["cast_impl"](self, src, dst_type)
        return _HANDLE(src.data.astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if not (is_bf16(src.dtype) or is_bf16(dst_type)):
            return original["create_fp_to_fp"](self, src, dst_type, rounding_mode)
        if is_bf16(dst_type) and "RTZ" in str(rounding_mode):
            truncated = src.data.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
            return _HANDLE(truncated.view(np.float32), dst_type.scalar)
        return cast_impl(self, src, dst_type)

    def create_bitcast(self, src, dst_type):
        if is_bf16(src.dtype) and is_bf16(dst_type):
            return src
        if is_bf16(src.dtype):
            src = _HANDLE(to_pattern(src.data), tl.uint16)
        if is_bf16(dst_type):
            return _HANDLE(from_pattern(src.data.view(np.uint16)), dst_type.scalar)
        return original["create_bitcast"](self, src, dst_type)

    def create_fabs(self, arg):
        if is_bf16(arg.dtype):
            return _HANDLE(np.abs(arg.data), arg.dtype.scalar)
        return original["create_fabs"](self, arg)

    def refuse_atomic(name: str):
        def create_atomic(self, *args, **options):
            if any(is_bf16(getattr(arg, "dtype", None)) for arg in args):
                raise TypeError("bf16 atomics are not interpreted; accumulate in float32")
            return original[name](self, *args, **options)

        return create_atomic

    return {
        "create_masked_load": create_masked_load,
        "create_masked_store": create_masked_store,
        "cast_impl": cast_impl,
        "create_fp_to_fp": create_fp_to_fp,
        "create_bitcast": create_bitcast,
        "create_fabs": create_fabs,
        "create_atomic_rmw": refuse_atomic("create_atomic_rmw"),
        "create_atomic_cas": refuse_atomic("create_atomic_cas"),
    }


# The interpreter's own, for the test that shows why they are replaced.
_STOCK = {
    name: getattr(_BUILDER, name) for name in (*_EXPECTED, "get_bf16") if hasattr(_BUILDER, name)
}
_STOCK_HOOKS = (
    interpreter._get_np_dtype,
    interpreter._validate_np_data_size,
    _HANDLE.__post_init__,
)


@contextlib.contextmanager
def stock_bf16() -> Iterator[None]:
    """Put the interpreter's own, wrong bf16 back inside an `interpreting()` block."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in zip(
            (interpreter, interpreter, _HANDLE),
            ("_get_np_dtype", "_validate_np_data_size", "__post_init__"),
            _STOCK_HOOKS,
            strict=True,
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.multiple(_BUILDER, **_STOCK))
        yield


@contextlib.contextmanager
def exact_bf16() -> Iterator[None]:
    """Replace the interpreter's bf16 for the duration of the block."""
    check_internals()
    np_dtype, fits = interpreter._get_np_dtype, interpreter._validate_np_data_size
    post_init = _HANDLE.__post_init__

    def get_np_dtype(dtype):
        return np.dtype(np.float32) if is_bf16(dtype) else np_dtype(dtype)

    def round_handle(self):
        # A comparison keeps its operands' dtype beside boolean data; those are no bf16 values.
        if is_bf16(self.dtype) and self.data.dtype != np.bool_:
            self.data = round_to_bf16(self.data)
        else:
            post_init(self)

    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(interpreter, "_get_np_dtype", get_np_dtype))
        enter(
            mock.patch.object(
                interpreter, "_validate_np_data_size", lambda d, t: is_bf16(t) or fits(d, t)
            )
        )
        enter(mock.patch.object(_HANDLE, "__post_init__", round_handle))
        enter(mock.patch.multiple(_BUILDER, **_replacements()))
        enter(mock.patch.object(_BUILDER, "get_bf16", _constant, create=True))
        yield


def _constant(self, value):
    return _HANDLE(np.array([value], np.float32), tl.bfloat16)


@contextlib.contextmanager
def language_restored() -> Iterator[None]:
    """Undo on exit what the interpreter does to triton.language; left in place (as Triton 3.6 and
    3.7 do, and 3.9 for nested calls) it breaks every later ahead-of-time compilation."""
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("triton.language")]
    classes = {c for m in modules for c in vars(m).values() if inspect.isclass(c)}
    classes = [c for c in classes if c.__module__.startswith("triton.language")]
    saved = [(space, dict(vars(space))) for space in (*modules, *classes)]
    try:
        yield
    finally:
        for space, before in saved:
            for name, value in list(vars(space).items()):
                if name not in before:
                    # Rewritten functions are cached and need the names they add to their module.
                    if inspect.isclass(space):
                        delattr(space, name)
                elif value is not before[name]:
                    setattr(space, name, before[name])


class _WholeLanguage:
    """What `_patch_lang` takes for a kernel: it patches the modules that a kernel's file names."""

    __globals__: ClassVar[dict] = {"tl": tl, "core": tl.core}


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Every `@triton.jit` kernel launched inside the block runs in the interpreter, on CPU tensors.

    Unlike TRITON_INTERPRET=1 it needs no environment variable before the first import of triton, so
    one process can interpret a kernel and also compile it ahead of time.
    """
    interpreted: dict[Any, Any] = {}  # keyed by the plain function: hashing a JITFunction parses it

    def twin(jitted: JITFunction):
        if jitted.fn not in interpreted:
            interpreted[jitted.fn] = interpreter.InterpretedFunction(jitted.fn)
        return interpreted[jitted.fn]

    def launch(self, *args, grid, warmup=False, **options):
        # Only while a kernel runs: a module imported meanwhile must still be jitted.
        with mock.patch.object(type(knobs.runtime), "interpret", True), language_restored():
            interpreter._patch_lang(_WholeLanguage)
            return twin(self).run(*args, grid=grid, warmup=warmup, **options)

    def call(self, *args, **options):
        # The interpreter would patch the language again at each call of a device function, which
        # takes longer than most of them do.
        return twin(self).rewrite()(*args, **options)

    with exact_bf16(), mock.patch.multiple(JITFunction, run=launch, __call__=call):
        yield
