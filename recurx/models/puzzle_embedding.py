"""The sparse puzzle embedding: a large table of which a training step touches a few rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recurx.errors import bad_argument
from recurx.models.layers import truncated_normal_


class PuzzleEmbedding(nn.Module):
    """A table `weights` [rows, width] without gradient, and a few `local_weights` with gradient.

    In training the rows of the batch are copied into `local_weights` [batch_size, width], which is
    a leaf with gradient; `sign_sgd_` writes the update back into the table. So neither gradient
    nor optimiser state of the table's size exists: an ARC table is 1.8 GB, the net 27 MB.
    The three buffers and their names are the official ones, so official optimisers work too.
    """

    weights: Tensor
    local_weights: Tensor
    local_ids: Tensor

    def __init__(
        self, rows: int, width: int, batch_size: int, cast_to: torch.dtype, init_std: float = 0.0
    ) -> None:
        super().__init__()
        self.cast_to = cast_to
        weights = truncated_normal_(torch.empty(rows, width), init_std)
        local = torch.zeros(batch_size, width, requires_grad=True)
        self.register_buffer("weights", weights)
        self.register_buffer("local_weights", local, persistent=False)
        self.register_buffer("local_ids", torch.zeros(batch_size, dtype=torch.int32), False)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [B, width] in the forward dtype; `ids` [B] of any integer dtype.

        Raises:
            InvalidArgument: in training, a batch larger than `batch_size`.
        """
        if not self.training:
            return self.weights[ids].to(self.cast_to)
        batch, room = ids.shape[0], self.local_weights.shape[0]
        if batch > room:
            raise bad_argument(
                "models", "puzzle_identifiers", f"a training batch of at most {room}", batch,
                f"Build the model with batch_size={batch} in its configuration.",
            )  # fmt: skip
        with torch.no_grad():
            self.local_weights[:batch].copy_(self.weights[ids])
            # Rows beyond the batch have zero gradient: give them an id that is updated anyway.
            self.local_ids.copy_(self.local_ids.new_zeros(room) if batch == 0 else ids[0])
            self.local_ids[:batch].copy_(ids)
        return self.local_weights[:batch].to(self.cast_to)

    @torch.no_grad()
    def sign_sgd_(self, lr: float | Tensor, weight_decay: float = 0.0) -> None:
        """One step of sign SGD with decoupled weight decay on the rows of the last batch.

        w <- w (1 - lr * weight_decay) - lr * sign(sum of the row's gradients); Adam does the same
        to a row that is seen rarely. Samples of one puzzle are summed by a [B, B] product instead
        of `unique`, which would wait for the device. Does nothing before a backward.
        """
        grad = self.local_weights.grad
        if grad is None:
            return
        ids = self.local_ids
        same_puzzle = (ids.unsqueeze(0) == ids.unsqueeze(1)).to(grad.dtype)
        rows = self.weights[ids] * (1 - lr * weight_decay) - lr * torch.sign(same_puzzle @ grad)
        self.weights[ids] = rows  # equal ids carry equal rows: order does not matter
        self.local_weights.grad = None
