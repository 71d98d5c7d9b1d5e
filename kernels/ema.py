"""average <- average + weight * (value - average) for any number of tensors in one launch.

    averages and values in bf16 or fp32 (one dtype each); weight a float, or an fp32 value on the
    device; from 1/2 on as value - (1 - weight) * (value - average), like torch.lerp, so that
    weight 1 gives exactly the value

A program takes one chunk (`multi_tensor`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from recurx.errors import bad_argument

from . import multi_tensor
from .multi_tensor import chunk_mask, chunk_pointer


@triton.jit
def ema_kernel(
    table, weight,
    WEIGHT_ON_DEVICE: tl.constexpr, AVERAGE_BF16: tl.constexpr, VALUE_BF16: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = table + tl.program_id(0) * 3
    offsets = tl.arange(0, CHUNK)
    inside = chunk_mask(row + 2, offsets, ALIGNED)
    average_at = chunk_pointer(row, AVERAGE_BF16, ALIGNED) + offsets
    value_at = chunk_pointer(row + 1, VALUE_BF16, ALIGNED) + offsets
    share = tl.load(weight) if WEIGHT_ON_DEVICE else weight

    average = tl.load(average_at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(value_at, mask=inside, other=0.0).to(tl.float32)
    change = value - average
    mixed = tl.where(share < 0.5, average + share * change, value - (1.0 - share) * change)
    tl.store(average_at, mixed.to(average_at.dtype.element_ty), mask=inside)


def ema(
    averages: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    weight: float | torch.Tensor,
    *,
    tables: multi_tensor.Tables,
    name: object = "",
) -> None:
    """Move each average towards its value by the share `weight`, in place.

    averages, values: contiguous, pairwise of one shape, one dtype (bf16 or fp32) a list, all on one
    device. weight: a float, or a 0-d fp32 tensor there. Raises InvalidArgument.
    """
    op = "kernels.ema"
    for arg, tensors in (("averages", averages), ("values", values)):
        if not multi_tensor.takes(*tensors) or len({t.dtype for t in tensors}) > 1:
            got = sorted({str(t.dtype) for t in tensors})
            raise bad_argument(op, arg, "contiguous tensors, all bf16 or all fp32", got)
    pairs = [(a, v) for a, v in zip(averages, values, strict=True) if a.numel()]
    if not pairs:
        return
    with torch.cuda.device_of(averages[0]):  # Triton launches on the current device
        table, aligned = tables.get(name, list(zip(*pairs, strict=True)))
        dtypes = pairs[0][0].dtype, pairs[0][1].dtype
        args, constants, options = launch_arguments(table, weight, *dtypes, aligned)
        ema_kernel[(table.shape[0],)](*args, **constants, **options)


def launch_arguments(
    table: torch.Tensor,
    weight: float | torch.Tensor,
    average_dtype: torch.dtype,
    value_dtype: torch.dtype,
    aligned: bool,
) -> tuple[tuple, dict, dict]:
    """(runtime arguments, compile-time arguments, compiler options) of one launch."""
    on_device = isinstance(weight, torch.Tensor)
    constants = {
        "WEIGHT_ON_DEVICE": on_device, "AVERAGE_BF16": average_dtype == torch.bfloat16,
        "VALUE_BF16": value_dtype == torch.bfloat16, "ALIGNED": aligned,
        "CHUNK": multi_tensor.CHUNK,
    }  # fmt: skip
    share = weight if on_device else float(weight)
    return (table, share), constants, {"num_warps": multi_tensor.WARPS, "enable_fp_fusion": True}
