"""The kernels of the training step: element by element, so no product and no shared memory ring."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import torch

from aot.triton_cases import Launch, TritonCase

BF16, FP32 = torch.bfloat16, torch.float32


def _meta(*shape: int | tuple[()], dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _adam_atan2(dtype: torch.dtype) -> Launch:
    from recurx.kernels.adam_atan2 import launch_arguments

    table, lr = _meta(6800, 6, dtype=torch.int64), _meta(())
    return launch_arguments(table, lr, (0.9, 0.95), 0.1, dtype, dtype, True)


def _ema(dtype: torch.dtype) -> Launch:
    from recurx.kernels.ema import launch_arguments

    return launch_arguments(_meta(6800, 3, dtype=torch.int64), _meta(()), FP32, dtype, True)


def _sign_sgd(dtype: torch.dtype) -> Launch:
    from recurx.kernels.sign_sgd import launch_arguments

    ids = _meta(768, dtype=torch.int32)
    return launch_arguments(_meta(10**6, 512), _meta(768, 512), ids, _meta(()), 0.1)


def _stablemax(dtype: torch.dtype) -> Launch:
    from recurx.kernels.stablemax_cross_entropy import launch_arguments

    logits = _meta(768, 97, 11, dtype=dtype)[:, 16:]
    return launch_arguments(logits, _meta(768, 81, dtype=torch.int64), -100)


def _forward(dtype: torch.dtype) -> Launch:
    args, constants, options = _stablemax(dtype)
    return (*args[:2], _meta(768, 81), *args[2:]), constants, options


def _backward(dtype: torch.dtype) -> Launch:
    args, constants, options = _stablemax(dtype)
    outputs = (_meta(768, 81), _meta(768, 81, 11, dtype=dtype))
    return (*args[:2], *outputs, *args[2:]), constants, options


def _act_halt(dtype: torch.dtype) -> Launch:
    from recurx.kernels.act_halt import launch_arguments

    steps, state = _meta(768, dtype=torch.int32), _meta(2, dtype=torch.int64)
    halted = _meta(768, dtype=torch.uint8)
    return launch_arguments(steps, _meta(768), _meta(768), state, halted, 16, 1 << 20)


def _queue_take(dtype: torch.dtype) -> Launch:
    from recurx.kernels.queue_take import launch_arguments

    halted, index = _meta(768, dtype=torch.uint8), _meta(768, dtype=torch.int64)
    return launch_arguments(halted, _meta((), dtype=torch.int64), index, 8 * 768)


# label, module, kernel, its launch by dtype, the dtypes
KERNELS = (
    ("adam_atan2", "adam_atan2", "adam_atan2_kernel", _adam_atan2, (FP32, BF16)),
    ("ema", "ema", "ema_kernel", _ema, (FP32,)),
    ("sign_sgd d=512", "sign_sgd", "sign_sgd_kernel", _sign_sgd, (FP32,)),
    ("stablemax forward", "stablemax_cross_entropy", "stablemax_forward_kernel", _forward, (BF16,)),
    ("stablemax backward", "stablemax_cross_entropy", "stablemax_backward_kernel", _backward,
     (BF16,)),
    ("act_halt", "act_halt", "act_halt_kernel", _act_halt, (FP32,)),
    ("queue_take", "queue_take", "queue_take_kernel", _queue_take, (FP32,)),
)  # fmt: skip


def cases(archs: tuple[str, ...]) -> Iterator[TritonCase]:
    for label, module, name, launch, dtypes in KERNELS:
        for dtype in dtypes:
            short = "bf16" if dtype == BF16 else "fp32"
            some = archs if label == "adam_atan2" else archs[-1:]  # none differs by architecture
            yield TritonCase(
                f"{label} {short}", dtype, some, _kernel(module, name),
                lambda dtype, _shared, launch=launch: launch(dtype), products=False,
            )  # fmt: skip


def _kernel(module: str, name: str) -> Callable[[], object]:
    return lambda: getattr(importlib.import_module(f"recurx.kernels.{module}"), name)
