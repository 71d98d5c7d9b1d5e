"""Adding up products over slabs of K, the same for every kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_product(acc, a, b, PRECISION: tl.constexpr):
    """acc + a @ b, fp32.

    fp32 operands are multiplied by ordinary multiply-adds, one after the other: summed into `acc`
    they would make one chain over all of K, whose error is 1.6 times PyTorch's at K=512 and 3 times
    at K=1536 (measured from the PTX in the emulator). So a slab is summed by itself and then added.
    NOTE: the compiler folds a sum of `acc` and a product into one chain again, unless the product
    asks for imprecise accumulation, which means nothing for fp32.
    """
    if a.dtype == tl.float32:
        return acc + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)
    return tl.dot(a, b, acc, input_precision=PRECISION)
