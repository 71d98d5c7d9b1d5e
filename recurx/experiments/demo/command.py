"""`python -m recurx demo`: recursion at work, in about three minutes on two cores.

1. a tiny model learns 6x6 Sudoku;  2. a board fills;  3. accuracy against refinement;
4. the trained model on every engine;  5. full-size TRM on 9x9 puzzles on every engine;
6. the 9x9 net that comes with recurx fills a board, and on a terminal the one that you type.
"""

from __future__ import annotations

from recurx.cli.options import THREADS_OF_TINY_NETS
from recurx.experiments.demo.options import Options

INTERRUPTED = 130
UNSOLVED = 1


def run(asked: Options) -> int:
    import time

    import torch

    from recurx.cli import output
    from recurx.experiments.demo import full_size, learn, shipped_net
    from recurx.experiments.tasks.sudoku.layout import to_boards
    from recurx.shipped_nets import available

    device = asked.prepare()
    console = output.make_console()
    if asked.puzzle_line is not None:
        return 0 if shipped_net.solve_typed(console, asked, device) else UNSOLVED
    start = time.perf_counter()
    puzzles, source = full_size.read_puzzles(asked)  # bad puzzles are told before the wait

    threads = torch.get_num_threads()
    if asked.threads is None:
        torch.set_num_threads(THREADS_OF_TINY_NETS)
    trained = learn.train(console, asked, device)
    if trained is None:
        return INTERRUPTED
    learn.show_filling(console, trained)
    report = learn.show_accuracy(console, trained)
    torch.set_num_threads(threads)
    small = full_size.race_trained(console, trained)
    large = full_size.race(console, puzzles, source, asked, device)
    net = None
    if asked.checkpoint or available("sudoku"):
        learn.heading(console, 6, "A trained 9x9 net, one board step by step")
        model, task, how = net = shipped_net.open_net(asked, device)
        shipped_net.fill(console, model, task, puzzles[0], how)
    seconds = time.perf_counter() - start
    puzzle = "".join(map(str, to_boards(trained.examples.inputs[0]).tolist()))
    console.print(
        f"\nThe demo took {seconds:.0f} s. The trained model solves what you type:\n"
        f"  python -m recurx solve --checkpoint {asked.out}/model.safetensors --halt-above 2 "
        f"{puzzle}",
        soft_wrap=True,
    )
    if net is not None and not asked.json:
        shipped_net.ask(console, *net)
    if asked.json:
        output.json_line(
            {"seconds": seconds, "training_seconds": trained.trainer.seconds, "trained": small,
             "full_size": large} | {k: v for k, v in report.to_dict().items() if k != "seconds"}
        )  # fmt: skip
    return 0
