"""Sign SGD on the rows of a large table that one batch touched, in one launch.

    w[id] <- w[id] (1 - lr * decay) - lr * sign(sum of grads[j] over all j with ids[j] = id)

    w [rows, D] fp32, grads [B, D] fp32, ids [B] int32 or int64; lr a float or a value on the device

A program owns slot i and a piece of D. It writes only if no slot before i has the same id, so a row
is written once, and adds the gradients of equal ids in a fixed order: no atomics, no sort, no
`unique`, and bit-equal reruns. Gradients of other ids are never fetched. Compiled without fused
multiply-adds, so a row has the bits of the official rule where its sums are exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from recurx.errors import bad_argument

SLOTS, COLUMNS = 16, 64  # gradients compared at a time, and of them columns: 32 values a thread
WARPS = 1  # a thread then holds whole columns: nothing passes through shared memory


@triton.jit
def sign_sgd_kernel(
    weights, grads, ids, lr, decay, keep, B,
    D: tl.constexpr, LR_ON_DEVICE: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    own = tl.load(ids + slot)
    total = tl.zeros((COLUMNS,), tl.float32)
    earlier = 0
    for start in range(0, B, SLOTS):
        others = start + tl.arange(0, SLOTS)
        same = (tl.load(ids + others, mask=others < B, other=0) == own) & (others < B)
        earlier += tl.sum((same & (others < slot)).to(tl.int32))
        wanted = same[:, None] & (columns < D)[None, :]
        found = tl.load(grads + others[:, None] * D + columns[None, :], mask=wanted, other=0.0)
        total += tl.sum(found, 0)
    inside = (columns < D) & (earlier == 0)
    if LR_ON_DEVICE:
        rate = tl.load(lr)
        kept = 1.0 - rate * decay
    else:
        rate = lr
        kept = keep
    at = weights + own.to(tl.int64) * D + columns
    sign = tl.where(total > 0, 1.0, tl.where(total < 0, -1.0, 0.0))
    w = tl.load(at, mask=inside, other=0.0)
    tl.store(at, w * kept - rate * sign, mask=inside)


def sign_sgd(
    weights: torch.Tensor,
    grads: torch.Tensor,
    ids: torch.Tensor,
    *,
    lr: float | torch.Tensor,
    weight_decay: float,
) -> None:
    """Update the rows `ids` of `weights` in place; shapes as above, all contiguous on one device.

    ids are not checked against the table: that would wait for the device. Raises InvalidArgument.
    """
    op = "kernels.sign_sgd"
    for arg, tensor in (("weights", weights), ("grads", grads)):
        if tensor.dtype != torch.float32 or tensor.ndim != 2 or not tensor.is_contiguous():
            got = f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"
            raise bad_argument(op, arg, "a contiguous fp32 matrix", got)
    if grads.shape[1] != weights.shape[1]:
        raise bad_argument(op, "grads", f"[B, {weights.shape[1]}]", tuple(grads.shape))
    integers = (torch.int32, torch.int64)
    if ids.shape != grads.shape[:1] or ids.dtype not in integers or not ids.is_contiguous():
        expected = f"contiguous int32 or int64 [{grads.shape[0]}]"
        raise bad_argument(op, "ids", expected, f"{ids.dtype} {tuple(ids.shape)}")
    if grads.numel() == 0:
        return
    args, constants, options = launch_arguments(weights, grads, ids, lr, weight_decay)
    grid = (grads.shape[0], triton.cdiv(grads.shape[1], COLUMNS))
    with torch.cuda.device_of(weights):  # Triton launches on the current device
        sign_sgd_kernel[grid](*args, **constants, **options)


def launch_arguments(
    weights: torch.Tensor,
    grads: torch.Tensor,
    ids: torch.Tensor,
    lr: float | torch.Tensor,
    weight_decay: float,
) -> tuple[tuple, dict, dict]:
    """(runtime arguments, compile-time arguments, compiler options) of one launch."""
    on_device = isinstance(lr, torch.Tensor)
    rate, keep = (lr, 0.0) if on_device else (float(lr), 1 - float(lr) * weight_decay)
    constants = {
        "D": grads.shape[1], "LR_ON_DEVICE": on_device, "SLOTS": SLOTS, "COLUMNS": COLUMNS,
    }  # fmt: skip
    args = (weights, grads, ids, rate, float(weight_decay), keep, grads.shape[0])
    return args, constants, {"num_warps": WARPS, "enable_fp_fusion": False}
