"""The sparse puzzle embedding: a large table of which a training step touches a few rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from recurx import small_ops
from recurx.errors import bad_argument
from recurx.models.layers import check_ids, truncated_normal_


class PuzzleEmbedding(nn.Module):
    """A table `weights` [rows, width] without gradient, and a few `local_weights` with gradient.

    In training the rows of the batch are copied into `local_weights` [batch_size, width], which is
    a leaf with gradient; `sign_sgd_` writes the update back into the table. So neither gradient
    nor optimiser state of the table's size exists: an ARC table is 1.8 GB, the net 27 MB.
    The three buffers and their names are the official ones, so official optimisers work too.
    `first_row` is where a batch begins that comes in parts, of which one sign SGD takes them all.
    """

    weights: Tensor
    local_weights: Tensor
    local_ids: Tensor

    def __init__(
        self, rows: int, width: int, batch_size: int, cast_to: torch.dtype, init_std: float = 0.0
    ) -> None:
        super().__init__()
        self.cast_to, self.first_row = cast_to, 0
        weights = truncated_normal_(torch.empty(rows, width), init_std)
        local = torch.zeros(batch_size, width, requires_grad=True)
        self.register_buffer("weights", weights)
        self.register_buffer("local_weights", local, persistent=False)
        self.register_buffer("local_ids", torch.zeros(batch_size, dtype=torch.int32), False)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> PuzzleEmbedding:
        """`.to()` and its kin; PyTorch would record the move of a buffer that has gradient."""
        super()._apply(fn, recurse)
        if not self.local_weights.is_leaf:
            self.local_weights = self.local_weights.detach().requires_grad_()
        return self

    def forward(self, ids: Tensor, training: bool | None = None) -> Tensor:
        """Rows [B, width] in the forward dtype; `ids` [B] of any integer dtype.

        Raises:
            InvalidArgument: ids that are no integers [B] or not within the table (looked for on the
                CPU alone: a GPU would wait, and asserts by itself); in training, a batch larger
                than `batch_size`.
        """
        check_ids("puzzle_identifiers", ids, len(self.weights), 1)
        ids = ids.to(torch.int64)  # indexing takes uint8 for a mask
        if ids.device.type != "cpu":  # and would count -1 from the end; now it asserts
            ids = torch.where(ids < 0, len(self.weights), ids)
        if not (self.training if training is None else training):
            return self.weights[ids].to(self.cast_to)
        batch, room = ids.shape[0], self.local_weights.shape[0] - self.first_row
        rows = slice(self.first_row, self.first_row + batch)
        if batch > room:
            raise bad_argument(
                "models", "puzzle_identifiers", f"a training batch of at most {room}", batch,
                f"Build the model with batch_size={batch} in its configuration.",
            )  # fmt: skip
        with torch.no_grad():
            self.local_weights[rows].copy_(self.weights[ids])
            # Rows beyond the batch have zero gradient: give them an id that is updated anyway.
            later = self.local_ids[self.first_row :]
            later.copy_(later.new_zeros(room) if batch == 0 else ids[0])
            self.local_ids[rows].copy_(ids)
        return self.local_weights[rows].to(self.cast_to)

    def sign_sgd_(self, lr: float | Tensor, weight_decay: float = 0.0) -> None:
        """One step of sign SGD on the rows of the last batch, see the function of this name.

        Does nothing before a backward, and forgets the gradient.
        """
        if self.local_weights.grad is not None:
            sign_sgd_(self.weights, self.local_weights.grad, self.local_ids, lr, weight_decay)
            self.local_weights.grad = None


@torch.no_grad()
def sign_sgd_(
    weights: Tensor, grads: Tensor, ids: Tensor, lr: float | Tensor, weight_decay: float = 0.0
) -> None:
    """Sign SGD with decoupled weight decay on the rows `ids` of `weights`, in place.

    w <- w (1 - lr * weight_decay) - lr * sign(sum of the row's gradients); Adam does the same to a
    row that is seen rarely. Without `unique`, which would wait for the device: on a GPU one launch
    (`kernels/sign_sgd.py`), elsewhere the gradients of equal ids are added, in the order of the
    batch, where their id occurs first, and equal ids write equal rows.

    Args:
        weights: [rows, D], the table.
        grads: [B, D], ids: [B], of the samples; equal ids may occur.
        lr: a float, or a 0-d tensor on the device.
    """
    if small_ops.on_triton(weights) and all(
        t.dtype == torch.float32 and t.is_contiguous() for t in (weights, grads)
    ):
        from recurx.kernels.sign_sgd import sign_sgd

        sign_sgd(weights, grads, ids.contiguous(), lr=lr, weight_decay=weight_decay)
        small_ops.wrote([weights])
        return
    if ids.numel() == 0:
        return
    first = (ids.unsqueeze(0) == ids.unsqueeze(1)).to(torch.uint8).argmax(-1)
    sums = torch.zeros_like(grads).index_add_(0, first, grads)[first]
    weights[ids.long()] = weights[ids.long()] * (1 - lr * weight_decay) - lr * torch.sign(sums)
