"""The C interface of the GPU kernels (csrc/cuda/api.h) as Python sees it: structs and entries.

The entries come from the compiled module, which gives their addresses, or from any shared library
that exports them (tests run emulated builds). Field for field the structs mirror those of the same
names in api.h; `Library` refuses a build whose structs have other sizes.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_uint64, c_void_p
from types import ModuleType
from typing import Any

from recurx.errors import CudaError
from recurx.plan.cuda import MAX_BLOCKS, MAX_NETS, MAX_READS, MAX_STATES

SUM_OWN, SUM_FORMED, SUM_KEPT = range(3)  # RxCall.sum

# Phases of the in-kernel timeline, in the order of csrc/cuda/owner_sm80/timeline.cuh.
PHASES = ("input", "token_mlp", "qkv", "attention", "o", "gate_up", "down", "store")


class RxCall(Structure):
    """One net call on states by index; index `num_states` is x."""

    _fields_ = [
        *((name, c_int32) for name in ("net", "write", "num_state", "num_inject", "sum", "stays")),
        ("state", c_int32 * MAX_READS),
        ("inject", c_int32 * MAX_READS),
        *((name, c_float) for name in ("scale", "keep", "damping", "noise")),
        ("number", c_int32),
    ]


class RxBlock(Structure):
    """One block of a net: its sizes, and what it has of a variant."""

    _fields_ = [
        *((name, c_int32) for name in ("token_mlp", "inner", "heads", "token_inner")),
        *((name, c_float) for name in ("eps", "residual_scale")),
        *((name, c_int32) for name in ("activation", "kv_heads", "biases")),
    ]


class RxNet(Structure):
    """The blocks of a net and its packed weights."""

    _fields_ = [("num_blocks", c_int32), ("blocks", RxBlock * MAX_BLOCKS), ("tape", c_void_p)]


class RxEvent(Structure):
    """One phase of the in-kernel timeline."""

    _fields_ = [
        *((name, c_int32) for name in ("call", "block", "phase", "sample")),
        ("start_ns", c_uint64),
        ("end_ns", c_uint64),
    ]


class RxRecursion(Structure):
    """A problem with its memory."""

    _fields_ = [
        *(
            (name, c_int32)
            for name in ("batch", "tokens", "hidden", "num_states", "num_nets", "num_calls")
        ),
        ("calls", c_void_p),
        ("nets", RxNet * MAX_NETS),
        *((name, c_void_p) for name in ("x", "cos", "sin")),
        ("states_in", c_void_p * MAX_STATES),
        ("states_out", c_void_p * MAX_STATES),
        ("scratch", c_void_p),
        ("scratch_bytes", c_int64),
        ("timeline", c_void_p),
        ("timeline_events", c_int64),
        ("seed", c_void_p),
    ]


class RxPack(Structure):
    """The weights of one net, and where their tape goes."""

    _fields_ = [
        *((name, c_int32) for name in ("hidden", "tokens", "num_blocks")),
        ("blocks", RxBlock * MAX_BLOCKS),
        *((name, c_void_p * (4 * MAX_BLOCKS)) for name in ("weights", "biases")),
        ("tape", c_void_p),
    ]


class RxOwnerPlan(Structure):
    """Settings of a plan of kind "owner"."""

    _fields_ = [(name, c_int32) for name in ("owners", "samples", "tiles", "in_scratch")]


class RxSolve(Structure):
    """A queue of samples, the heads, and where answers go."""

    _fields_ = [
        *(
            (name, c_int32)
            for name in ("entries", "rollouts", "max_steps", "halt", "output", "prefix", "vocab")
        ),
        ("halt_above", c_float),
        ("sigma", c_float),
        ("seed", c_uint64),
        ("x", c_void_p),
        ("start", c_void_p * MAX_STATES),
        *((name, c_void_p) for name in ("slot_x", "lm_head", "q_head", "q_bias")),
        *((name, c_void_p) for name in ("next", "predictions", "steps", "halted", "q")),
        *((name, c_void_p) for name in ("logits", "trace")),
    ]


class RxGridPlan(Structure):
    """Settings of a plan of kind "grid"."""

    _fields_ = [
        ("ctas", c_int32),
        ("row_groups", c_int32 * 4),
        ("k_splits", c_int32 * 4),
        *((name, c_int32) for name in ("shared_bytes", "fp8", "cluster")),
    ]


class RxClusterPlan(Structure):
    """Settings of a plan of kind "cluster"."""

    _fields_ = [("cluster", c_int32)]


# In the order of rx_struct_sizes.
_MIRRORED = (
    RxCall, RxBlock, RxNet, RxEvent, RxRecursion, RxPack, RxSolve, RxOwnerPlan, RxGridPlan,
    RxClusterPlan,
)  # fmt: skip

# The kernel family of each kind of plan, as its entries are named.
FAMILIES = {"owner": "owner_sm80", "grid": "grid_sm80", "cluster": "cluster_sm90a"}

# Entries that return an error code, and those that return a number of bytes.
_CODES = {
    "rx_owner_sm80_run": [POINTER(RxRecursion), POINTER(RxOwnerPlan), c_void_p],
    "rx_owner_sm80_solve": [POINTER(RxRecursion), POINTER(RxOwnerPlan), POINTER(RxSolve), c_void_p],
    "rx_owner_sm80_pack": [POINTER(RxPack), c_void_p],
    "rx_grid_sm80_run": [POINTER(RxRecursion), POINTER(RxGridPlan), c_void_p],
    "rx_cluster_sm90a_run": [POINTER(RxRecursion), POINTER(RxClusterPlan), c_void_p],
    "rx_cluster_sm90a_solve": [
        POINTER(RxRecursion), POINTER(RxClusterPlan), POINTER(RxSolve), c_void_p,
    ],
    "rx_cluster_sm90a_pack": [POINTER(RxPack), c_void_p],
}  # fmt: skip
_BYTES = {
    "rx_owner_sm80_scratch_bytes": [POINTER(RxRecursion), POINTER(RxOwnerPlan)],
    "rx_owner_sm80_shared_bytes": [POINTER(RxRecursion), POINTER(RxOwnerPlan)],
    "rx_owner_sm80_tape_bytes": [POINTER(RxPack)],
    "rx_grid_sm80_scratch_bytes": [POINTER(RxRecursion), POINTER(RxGridPlan)],
    "rx_grid_sm80_fixed_shared_bytes": [POINTER(RxRecursion), POINTER(RxGridPlan)],
    "rx_grid_sm80_tape_bytes": [POINTER(RxPack), c_int32],
    "rx_cluster_sm90a_scratch_bytes": [POINTER(RxRecursion), POINTER(RxClusterPlan)],
    "rx_cluster_sm90a_tape_bytes": [POINTER(RxPack)],
}
_REBUILD = "rebuild recurx._C (python csrc/native_build.py)"


class Library:
    """The entries of one build.

    Args:
        source: the compiled module (with `cuda_entries`), or a `ctypes.CDLL`.

    Raises:
        CudaError: the build's structs are not those of this file.
    """

    def __init__(self, source: ModuleType | ctypes.CDLL) -> None:
        self._source = source
        self._addresses: dict[str, int] = (
            source.cuda_entries() if hasattr(source, "cuda_entries") else {}
        )
        if not self._has("rx_struct_sizes"):
            raise CudaError(f"recurx: the compiled kernels are of another recurx; {_REBUILD}")
        sizes = (c_int32 * len(_MIRRORED))()
        self._entry("rx_struct_sizes", None, [POINTER(c_int32)])(sizes)
        wanted = [ctypes.sizeof(mirrored) for mirrored in _MIRRORED]
        if list(sizes) != wanted:
            raise CudaError(
                f"recurx: the compiled kernels have structs of {list(sizes)} bytes, this recurx "
                f"of {wanted}; {_REBUILD}"
            )
        self._last_error = self._entry("rx_cuda_last_error", ctypes.c_char_p, [])
        self._error_name = self._entry("rx_cuda_error_name", ctypes.c_char_p, [c_int32])
        self._codes = self._entries(c_int32, _CODES)
        self._sizes = self._entries(c_int64, _BYTES)
        # An emulated build may hold some families only.
        self.kinds = tuple(k for k, family in FAMILIES.items() if f"rx_{family}_run" in self._codes)
        self.has_timeline = bool(self._entry("rx_timeline_compiled", c_int32, [])())

    def _has(self, name: str) -> bool:
        return name in self._addresses if self._addresses else hasattr(self._source, name)

    def _entries(self, result: Any, wanted: dict[str, list[Any]]) -> dict[str, Any]:
        """Those entries that this build holds."""
        return {
            name: self._entry(name, result, types)
            for name, types in wanted.items()
            if self._has(name)
        }

    def _entry(self, name: str, result: Any, arguments: list[Any]) -> Any:
        if self._addresses:
            return ctypes.CFUNCTYPE(result, *arguments)(self._addresses[name])
        function = getattr(self._source, name)
        function.restype, function.argtypes = result, arguments
        return function

    def call(self, name: str, *arguments: Any) -> None:
        """Call an entry that returns an error code; structs are passed by reference.

        Raises:
            CudaError: with the message of the kernel's host code and the CUDA error's name.
        """
        code = self._codes[name](*(_by_reference(argument) for argument in arguments))
        if code:
            text = self._last_error().decode()
            error = self._error_name(code).decode()
            raise CudaError(f"recurx: {text}" + ("" if error in text else f" ({error})"))

    def bytes_of(self, name: str, *arguments: Any) -> int:
        """Call an entry that returns a number of bytes."""
        return int(self._sizes[name](*(_by_reference(argument) for argument in arguments)))


def _by_reference(argument: Any) -> Any:
    return byref(argument) if isinstance(argument, Structure) else argument
