"""`python -m recurx demo`: recursion at work, in about three minutes on two cores.

1. a tiny model learns 6x6 Sudoku;  2. a board fills;  3. accuracy against refinement;
4. the trained model on every engine;  5. full-size TRM on 9x9 puzzles on every engine;
6. the 9x9 net that comes with recurx fills a board, and on a terminal the one that you type.
"""

from __future__ import annotations

import argparse

from recurx.cli import options
from recurx.cli.options import THREADS_OF_TINY_NETS

INTERRUPTED = 130
UNSOLVED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("puzzle", nargs="*", help="9x9 puzzles for the full-size model, 81 "
                        "characters each, 0 or . for a blank")  # fmt: skip
    parser.add_argument("--puzzle", dest="puzzle_line", metavar="LINE", help="only this: the net "
                        "that comes with recurx solves this 9x9 puzzle, step by step")  # fmt: skip
    parser.add_argument("--puzzles", metavar="FILE", help="a file of such lines, or a CSV")
    parser.add_argument("--checkpoint", metavar="FILE", help="trained weights of 9x9 Sudoku: for "
                        "the full-size model (random without), and for --puzzle")  # fmt: skip
    parser.add_argument("--time-budget", type=options.seconds, default=90.0, metavar="TIME",
                        help="for the training at most (default 90s)")  # fmt: skip
    parser.add_argument("--out", default="runs/demo", metavar="FOLDER", help="(default runs/demo)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--seed", type=int, default=0)
    options.add_machine(parser)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(arguments: argparse.Namespace) -> int:
    import time

    import torch

    from recurx.cli import output
    from recurx.cli.demo import full_size, learn, shipped_net
    from recurx.shipped_nets import available
    from recurx.tasks.sudoku.layout import to_boards

    device = options.prepare_machine(arguments)
    console = output.make_console()
    if arguments.puzzle_line is not None:
        return 0 if shipped_net.solve_typed(console, arguments, device) else UNSOLVED
    start = time.perf_counter()
    puzzles, source = full_size.read_puzzles(arguments)  # bad puzzles are told before the wait

    threads = torch.get_num_threads()
    if arguments.threads is None:
        torch.set_num_threads(THREADS_OF_TINY_NETS)
    trained = learn.train(console, arguments, device)
    if trained is None:
        return INTERRUPTED
    learn.show_filling(console, trained)
    report = learn.show_accuracy(console, trained)
    torch.set_num_threads(threads)
    small = full_size.race_trained(console, trained)
    large = full_size.race(console, puzzles, source, arguments, device)
    net = None
    if arguments.checkpoint or available("sudoku"):
        learn.heading(console, 6, "A trained 9x9 net, one board step by step")
        model, task, how = net = shipped_net.open_net(arguments, device)
        shipped_net.fill(console, model, task, puzzles[0], how)
    seconds = time.perf_counter() - start
    puzzle = "".join(map(str, to_boards(trained.examples.inputs[0]).tolist()))
    console.print(
        f"\nThe demo took {seconds:.0f} s. The trained model solves what you type:\n"
        f"  python -m recurx solve --checkpoint {arguments.out}/model.safetensors --halt-above 2 "
        f"{puzzle}",
        soft_wrap=True,
    )
    if net is not None and not arguments.json:
        shipped_net.ask(console, *net)
    if arguments.json:
        output.json_line(
            {"seconds": seconds, "training_seconds": trained.trainer.seconds, "trained": small,
             "full_size": large} | {k: v for k, v in report.to_dict().items() if k != "seconds"}
        )  # fmt: skip
    return 0
