"""The structs of csrc/cuda/api.h for ctypes, as in recurx/backends/cuda_abi.py but without torch.

Its import would take most of the time of the processes that run one planted bug each.
"""

from __future__ import annotations

import ctypes

int32, pointer, eight = ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32 * 8


class RxCall(ctypes.Structure):
    _fields_ = [
        *((name, int32) for name in ("net", "write", "num_state", "num_inject")),
        ("state", eight),
        ("inject", eight),
    ]


class RxBlock(ctypes.Structure):
    _fields_ = [
        *((name, int32) for name in ("token_mlp", "inner", "heads", "token_inner")),
        ("eps", ctypes.c_float),
    ]


class RxNet(ctypes.Structure):
    _fields_ = [("num_blocks", int32), ("blocks", RxBlock * 8), ("tape", pointer)]


class RxEvent(ctypes.Structure):
    _fields_ = [
        *((name, int32) for name in ("call", "block", "phase", "sample")),
        ("start_ns", ctypes.c_uint64),
        ("end_ns", ctypes.c_uint64),
    ]


SIZES = ("batch", "tokens", "hidden", "num_states", "num_nets", "num_calls")


class RxRecursion(ctypes.Structure):
    _fields_ = [
        *((name, int32) for name in SIZES),
        ("calls", pointer),
        ("nets", RxNet * 2),
        *((name, pointer) for name in ("x", "cos", "sin")),
        ("states_in", pointer * 8),
        ("states_out", pointer * 8),
        ("scratch", pointer),
        ("scratch_bytes", ctypes.c_int64),
        ("timeline", pointer),
        ("timeline_events", ctypes.c_int64),
    ]


class RxPack(ctypes.Structure):
    _fields_ = [
        *((name, int32) for name in ("hidden", "tokens", "num_blocks")),
        ("blocks", RxBlock * 8),
        ("weights", pointer * 32),
        ("tape", pointer),
    ]


MIRRORED = (RxCall, RxBlock, RxNet, RxEvent, RxRecursion, RxPack)  # as rx_recursion_abi counts


def check_sizes(library: ctypes.CDLL) -> None:
    """Raises AssertionError where a struct here is not as large as in C."""
    sizes = (int32 * len(MIRRORED))()
    library.rx_recursion_abi(sizes)
    for struct, size in zip(MIRRORED, sizes, strict=True):
        assert ctypes.sizeof(struct) == size, f"{struct.__name__}: {size} bytes in C"
