"""How fast the emulator is here: python -m emulator.speed (from tests/), best of three runs each.

GFLOP/s are of the products alone, on all workers. The net call has the products of one call of
TRM's net at full size: 97 rows (padded to 128), 512 wide, the 6.8 million weights of two blocks.
Times on a machine that does other work mean little: CPU seconds are shown beside them.
"""

from __future__ import annotations

import time

from .gemm_residual_rms import FILES, Case, load

NET_CALL = (97, 512, 13312)
ROUNDS = 3


def main() -> None:
    print("| kernel | build | net call, s | CPU s | GFLOP/s | GFLOP/s a CPU second |")
    case = Case(*NET_CALL)
    flop = 2 * 128 * case.n * case.k
    for kernel in FILES:
        for checked in (False, True):
            library = load(kernel, checked)
            best = (float("inf"), float("inf"))
            for seed in range(1, ROUNDS + 1):
                library.configure(seed=seed)
                wall, cpu = time.perf_counter(), time.process_time()
                out = case.run(library, kernel)
                took = time.perf_counter() - wall, time.process_time() - cpu
                best = min(best[0], took[0]), min(best[1], took[1])
                assert case.compare(out) is None
            rates = " | ".join(f"{flop / t * 1e-9:.2f}" for t in best)
            name = "checked" if checked else "plain"
            print(f"| {kernel} | {name} | {best[0]:.2f} | {best[1]:.2f} | {rates} |", flush=True)


if __name__ == "__main__":
    main()
