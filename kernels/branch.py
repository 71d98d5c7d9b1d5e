"""What becomes of a product before it is added to the residual, as values.

kernels/pointwise.py computes it, recurx/reference.py says the same in `_sublayer`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recurx.errors import bad_argument


class Norm(NamedTuple):
    """A norm "rms" or "layer", and its vectors [N] if it has any."""

    kind: str
    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None


class Drops(NamedTuple):
    """Shares of elements and of whole samples that are dropped, and where their draws begin.

    `stream` int64 [2]: the seed and the number of the first sample; the draws of elements are those
    of recurx/noise.py for `call` and `use`, those of samples for `use` + 4.
    """

    elements: float = 0.0
    samples: float = 0.0
    stream: Tensor | None = None
    call: int = 0
    use: int = 0


class Branch(NamedTuple):
    """What becomes of a product before it is added, and of the residual; see `add_norm`.

    `bias` is [N], or [T] if `bias_of_token` says so (rows over D); learned factors [1] or [N].
    """

    bias: Tensor | None = None
    bias_of_token: bool = False
    norm: Norm | None = None
    scale: float = 1.0
    learned: Tensor | None = None
    skip: float = 1.0
    learned_skip: Tensor | None = None
    drops: Drops = Drops()


PLAIN, PLAIN_NORM = Branch(), Norm("", 1.0)


def single(vector: Tensor | None) -> bool:
    """Whether a learned factor is one for all columns."""
    return vector is not None and vector.numel() == 1


def check_vectors(op: str, n: int, tokens: int, norm: Norm, branch: Branch) -> None:
    """A kernel reads as many values of a vector as its rows are long, n."""
    before = branch.norm or PLAIN_NORM
    vectors = [(v, n) for v in (norm.weight, norm.bias, before.weight, before.bias)]
    vectors.append((branch.bias, tokens if branch.bias_of_token else n))
    factors = branch.learned, branch.learned_skip
    vectors += [(factor, 1 if single(factor) else n) for factor in factors]
    for vector, length in vectors:
        if vector is not None and (vector.shape != (length,) or not vector.is_contiguous()):
            got = f"{tuple(vector.shape)}, strides {vector.stride()}"
            raise bad_argument(op, "a vector", f"contiguous [{length}]", got)
    drawn = branch.drops.stream
    if drawn is not None and (drawn.dtype != torch.int64 or drawn.shape != (2,)):
        raise bad_argument(op, "drops.stream", "int64 [2]", f"{drawn.dtype} {tuple(drawn.shape)}")
