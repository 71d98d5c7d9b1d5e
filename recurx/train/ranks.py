"""Several processes that train one model: each holds a slice of the batch's slots.

    slots of the batch   0 .. B-1      rank r holds  r B/N .. (r+1) B/N - 1

Whatever concerns the whole batch is done by all ranks alike: each draws every sample, learns which
slots of all ranks halted, and so hands out the samples that one rank would. Gradients, of a loss
divided by B, and metrics are summed. So N ranks compute what one does, up to the order of sums.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recurx.errors import InvalidArgument, RunFailed, bad_argument


class Ranks:
    """The ranks of PyTorch's default process group; a single one where there is no group.

    Args:
        world: number of ranks.
        rank: which one this is.
    """

    def __init__(self, world: int = 1, rank: int = 0) -> None:
        self.world, self.rank = world, rank

    @classmethod
    def of_this_process(cls) -> Ranks:
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(dist.get_world_size(), dist.get_rank())

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and talks."""
        return self.rank == 0

    def own(self, slots: int) -> slice:
        """Which of the batch's slots this rank holds.

        Raises:
            InvalidArgument: the ranks cannot have equally many.
        """
        if slots % self.world:
            raise bad_argument(
                "train", "batch_size", f"a multiple of the {self.world} ranks", slots,
                "It is the size of the whole batch, which the ranks share.",
            )  # fmt: skip
        each = slots // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over ranks; the same bits on every rank.

        One collective a dtype: hundreds of small ones would cost more than the bytes they move.
        """
        if self.world == 1:
            return
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            some = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in some])
            self._all_reduce(flat)
            parts = flat.split([t.numel() for t in some])
            torch._foreach_copy_(some, [p.view_as(t) for p, t in zip(parts, some, strict=True)])

    def gather(self, own: Tensor) -> Tensor:
        """[B, ...] from the [B/N, ...] of each rank."""
        if self.world == 1:
            return own
        # As bytes: gloo does not take every dtype. A row of them for each slot, whatever its shape.
        rows = own.contiguous().view(own.shape[0], -1).view(torch.uint8)
        every = self._all_gather(rows)
        return every.view(own.dtype).view(every.shape[0], *own.shape[1:])

    def agree(self, number: int) -> int:
        """The largest number that any rank says. On the host: does not wait for a GPU."""
        if self.world == 1:
            return number
        said = torch.tensor(number)
        try:
            dist.all_reduce(said, dist.ReduceOp.MAX)
        except RuntimeError as error:
            raise RunFailed("another rank has ended, and says why by itself.") from error
        return int(said)

    def first_says(self, value: Any) -> Any:
        """What the first rank gives here, whatever can be pickled; all must call it."""
        said = [value]
        if self.world > 1:
            dist.broadcast_object_list(said, src=0)
        return said[0]

    # What a test replaces, with `agree` and `first_says`, to have ranks in one process.
    def _all_reduce(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor)

    def _all_gather(self, rows: Tensor) -> Tensor:
        return all_gather(rows, self.world)


def all_gather(own: Tensor, world: int) -> Tensor:
    """[N b, ...] from the [b, ...] of each rank of the default process group, in their order."""
    every = own.new_empty(world * own.shape[0], *own.shape[1:])
    # Named anew in torch 2.13, where the old name warns at every call.
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    collective(every, own.contiguous())
    return every


def join_torchrun(device: torch.device) -> Ranks:
    """Join the group that torchrun started this process for, if it did.

    gloo carries what lies on the CPU (the host's agreements), nccl what lies on GPUs.

    Args:
        device: of this rank.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    said = os.environ.get("WORLD_SIZE", "1")
    try:
        if int(said) > 1 and not dist.is_initialized():
            # Its defaults keep for ever the group that there is at its import, which optimisers
            # cause.
            importlib.import_module("torch.distributed.nn")
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            atexit.register(_leave)
    except ValueError as error:  # no number, or another variable of torchrun's is missing
        raise InvalidArgument(f"WORLD_SIZE={said}, without torchrun? {error}. Unset it.") from error
    return Ranks.of_this_process()


def _leave() -> None:
    """Join the group's threads while there is an interpreter; they end with the last reference to
    the group, and DistributedDataParallel, which has one, lies in a cycle."""
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
