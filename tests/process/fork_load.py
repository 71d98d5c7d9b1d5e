"""Forks a process whose threads are calling recurx all the while; each child answers and ends.

    python -m tests.process.fork_load --children 100 --seed 1

Prints how many children answered right. What differs from child to child is where the other threads
stood at the fork: in a look-up, packing, comparing, timing, in the engine, in an import.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import os
import random
import threading
import time
from typing import Any

# Verdicts are measured as in a user's process; nothing of it is left on the disk.
os.environ.update(RECURX_AUTOTUNE="1", RECURX_CACHE="0")

import torch
from torch import Tensor

import recurx
from recurx import Schedule, reference
from recurx.plan import cpu as plan
from tests import forked
from tests.factories import make_inputs, make_net, rope

SCHEDULE = Schedule.trm(1, 2)
WAYS = ("cpu", "auto", "eager")
PATIENCE = 20  # seconds until a child counts as hanging


def case(seed: int) -> tuple[dict[str, Any], Tensor, dict[str, Tensor], Any]:
    """Nets and inputs of a size of its own, so that no child finds everything prepared."""
    shape = dict(tokens=9 + seed % 23, hidden=64)
    x, carry = make_inputs(SCHEDULE, batch=1 + seed % 5, seed=seed, **shape)
    return {"L": make_net(**shape, heads=2, seed=seed)}, x, carry, rope(**shape, heads=2)


def answers(seed: int, backend: str) -> bool:
    """Whether a backend's answer is the specification's."""
    nets, x, carry, tables = case(seed)
    with torch.no_grad():
        got = recurx.recurse(SCHEDULE, nets, x, carry, backend=backend, cos_sin=tables)
        want = reference.run(SCHEDULE, nets, x, carry, tables)
    return all(torch.allclose(got[name], want[name], rtol=1e-4, atol=1e-4) for name in want)


def child(number: int) -> bool:
    """Whether every way gives the right answer, twice."""
    faulthandler.dump_traceback_later(PATIENCE / 2)  # where it hangs
    nets, x, carry, tables = case(number)
    with torch.no_grad():  # on two threads of the engine's own
        first = recurx.recurse(SCHEDULE, nets, x, carry, backend="cpu", cos_sin=tables)
    torch.set_num_threads(1)  # PyTorch's OpenMP threads did not survive the fork
    want = reference.run(SCHEDULE, nets, x, carry, tables)
    right = [torch.allclose(first[name], want[name], rtol=1e-4, atol=1e-4) for name in want]
    right += [answers(seed, way) for seed in (number, number + 1000) for way in WAYS]
    return all(right)


def load(stop: threading.Event, seed: int) -> None:
    """What the other threads do: old calls and new ones, with packing and measuring in them."""
    step = 0
    while not stop.is_set():
        assert answers(seed + step % 40, WAYS[step % 3])
        if step % 10 == 0:
            recurx.trials.forget()
        step += 1


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--children", type=int, default=100)
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    plan.LEAST_SPLIT = 0  # small work on several threads too
    torch.set_num_threads(2)
    draw = random.Random(options.seed)
    stop = threading.Event()
    threads = [threading.Thread(target=load, args=(stop, 100 * n)) for n in range(options.threads)]
    for thread in threads:
        thread.start()
    outcomes: list[int] = []
    waiting: list[int] = []
    for number in range(options.children):
        time.sleep(0.02 * draw.random())
        waiting.append(forked.begun(functools.partial(child, number), PATIENCE))
        while len(waiting) >= 4:
            outcomes.append(os.waitpid(waiting.pop(0), 0)[1])
    outcomes += [os.waitpid(pid, 0)[1] for pid in waiting]
    stop.set()
    for thread in threads:
        thread.join()
    print(f"{outcomes.count(0)} of {len(outcomes)} answered right; others: "
          f"{[code for code in outcomes if code]}")  # fmt: skip
    return 0 if not any(outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
