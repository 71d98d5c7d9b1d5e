"""Argument checks that the kernels' host functions share."""

from __future__ import annotations

import torch

from recurx.errors import bad_argument

DTYPES = (torch.bfloat16, torch.float32)


def same_dtype_and_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise InvalidArgument unless all are bfloat16, or all float32, on one device."""
    (_, first), *_ = tensors.items()
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES or tensor.dtype != first.dtype:
            expected = "bfloat16 or float32, the same for all"
            raise bad_argument(op, name, expected, tensor.dtype)
        if tensor.device != first.device:
            raise bad_argument(op, name, f"a tensor on {first.device}", tensor.device)


def shape(op: str, name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise bad_argument(op, name, f"shape {expected}", tuple(tensor.shape))


def float32(op: str, name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Raise InvalidArgument unless it is a contiguous float32 tensor of that shape."""
    if tensor.dtype != torch.float32 or not tensor.is_contiguous():
        got = f"{tensor.dtype} with strides {tensor.stride()}"
        raise bad_argument(op, name, "contiguous float32", got)
    shape(op, name, tensor, expected)


def matrix_of_rows(op: str, name: str, tensor: torch.Tensor) -> tuple[int, int]:
    """The shape of a [rows, columns] tensor whose rows are contiguous; they may lie apart."""
    if tensor.ndim != 2 or (tensor.stride(1) != 1 and tensor.shape[1] > 1):
        got = f"{tuple(tensor.shape)} with strides {tensor.stride()}"
        raise bad_argument(op, name, "a matrix with contiguous rows", got)
    return tensor.shape[0], tensor.shape[1]


def contiguous_matrix(op: str, name: str, tensor: torch.Tensor) -> tuple[int, int]:
    """The shape of a contiguous [rows, columns] tensor."""
    if tensor.ndim != 2 or not tensor.is_contiguous():
        got = f"{tuple(tensor.shape)} with strides {tensor.stride()}"
        raise bad_argument(op, name, "a contiguous matrix", got, "call .contiguous() on it")
    return tensor.shape[0], tensor.shape[1]


def weight_matrix(op: str, name: str, weight: torch.Tensor, k: int) -> tuple[int, int]:
    """The shape of a weight [N, K'] whose first k columns are multiplied.

    K' is k, or k rounded up to 16 (`recurx.packed.PackedNets` pads rows with zeros, so that
    they can be copied 16 bytes at a time).
    """
    rows, columns = contiguous_matrix(op, name, weight)
    padded = -(-k // 16) * 16
    if columns not in (k, padded):
        raise bad_argument(
            op, name, f"[N, {k}] or, padded with zeros, [N, {padded}]", (rows, columns)
        )
    return rows, columns
