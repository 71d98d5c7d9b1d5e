"""Tile sizes of the backward kernels, chosen as in tiles.py: from shape, storage type, shared
memory and the number of multiprocessors, never from a device's name.
"""

from __future__ import annotations

from .tiles import SCRATCH_BYTES, Chip, Tile

WGMMA_SHARED = 200_000  # a block with more is one of sm_90 or sm_100 (tiles.SHARED_BYTES)
WGRAD_ROWS = 512  # fewest rows of one split: below it the partial sums cost more than the product
WGRAD_BYTES = 1 << 26  # most memory for one weight's partial sums
WGRAD_WAVES = 8  # most waves of programs: 7 of 8 are full even if the last has a single program
FLOPS_A_BYTE = 200  # of bf16 products and of DRAM on an H100: 600 TFLOP/s and 3 TB/s (published)


def _power(n: int) -> int:
    """The smallest power of two that is at least n, and 16: tl.dot takes no less."""
    return max(16, 1 << (n - 1).bit_length())


def _staged(
    rows: int, cols: int, chunks: int, depth: int, warps: int, itemsize: int, shared: int
) -> Tile:
    """The tile with as many pipeline stages as fit, 4 at most."""
    tile = Tile(rows, cols, chunks, depth, warps, stages=1)
    stages = min(4, (shared - SCRATCH_BYTES) // tile.stage_bytes(itemsize))
    return Tile(rows, cols, chunks, depth, warps, max(1, stages))


def swiglu_backward_tile(m: int, n: int, k: int, itemsize: int, chip: Chip) -> Tile:
    """rows x cols of three products (gate, up, d_mid), two of them over one slab of x."""
    narrow = itemsize == 4
    cols = min(32 if narrow else 64, _power(n))
    rows = 32 if narrow else 128 if -(-m // 128) * -(-n // cols) >= chip.units else 64
    depth = min(32 if narrow else 64, _power(k))
    warps = 8 if rows == 128 or narrow else 4
    return _staged(rows, cols, 2, depth, warps, itemsize, chip.shared)


def wgrad_tile(m: int, n: int, k: int, itemsize: int, shared: int) -> Tile:
    """rows x cols of a weight gradient [n, k] over m rows, depth rows a step."""
    largest = 64 if itemsize == 4 else 128
    rows, cols = min(largest, _power(n)), min(largest, _power(k))
    depth = min(32 if itemsize == 4 else 64, _power(max(1, m)))
    return _staged(rows, cols, 1, depth, 8 if rows * cols >= 128 * 128 else 4, itemsize, shared)


def wgrad_split(m: int, n: int, k: int, tile: Tile, units: int) -> int:
    """Into how many ranges the m rows of a weight gradient [n, k] are cut on `units` SMs.

    The split of least time, reckoned: an SM has one program of a wave, a wave ends with its last
    program, and each range costs a read and a write of its fp32 partial sums.
    """
    tiles = -(-n // tile.rows) * -(-k // tile.cols)

    def cost(split: int) -> int:
        rows = -(-tiles * split // units) * -(-m // split)  # that one SM goes over, in its waves
        return rows * units * 2 * tile.rows * tile.cols + split * n * k * 8 * FLOPS_A_BYTE

    most = min(m // WGRAD_ROWS, WGRAD_BYTES // (4 * n * k), WGRAD_WAVES * units // tiles)
    return min(range(1, max(1, most) + 1), key=cost)


def attention_backward_tile(
    tokens: int, head_dim: int, itemsize: int, shared: int, turn: bool = False
) -> tuple[Tile, bool]:
    """rows are the queries a step, cols the keys that a program owns (and the other way round); and
    whether a program that owns all keys of a head shall make d_q too.

    A block with less shared memory than an sm_90's multiplies from registers (mma.sync): there it
    takes fewer queries a step, and d_q beside 128 keys would spill. `turn`, rotating what is
    loaded, wants registers too: there the addresses of copies ahead of a long loop would spill.
    """
    narrow, roomy = itemsize == 4, shared >= WGMMA_SHARED
    longest = _power(tokens)
    owned = 128 if head_dim < 128 else 64 if roomy else 32
    step = 64 if roomy and head_dim < 128 else 32
    if narrow:
        owned, step = 32, 16 if head_dim > 32 else 32
    rows, cols = min(longest, step), min(longest, owned)
    held = 2 * cols * head_dim * itemsize  # K and V
    # Q, the output and its gradient, and the rows of cos and sin
    bytes_a_step = rows * head_dim * (3 * itemsize + 8 * turn)
    tight = turn and head_dim > 32 and tokens > cols and (narrow or not roomy)
    stages = max(1, min(1 if tight else 2, (shared - SCRATCH_BYTES - held) // bytes_a_step))
    wide = cols >= 64 or (narrow and head_dim == 128)
    tile = Tile(rows, cols, 1, head_dim, 8 if wide else 4, stages)
    return tile, cols >= tokens and (roomy or cols <= 64)


def rms_tile(n: int, rows_are_contiguous: bool) -> Tile:
    """Whole rows of n columns; 32 of them where neighbours in memory are neighbouring rows."""
    cols = _power(n)
    rows = max(1, 4096 // cols)
    return Tile(max(rows, 32) if rows_are_contiguous else rows, cols, 1, 1, 4, 1)
