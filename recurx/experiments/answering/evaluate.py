"""`python -m recurx eval [TASK]`: accuracy by the rules, step by step, and what budgets buy."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recurx.bench.paths import check_writable
from recurx.cli import options
from recurx.errors import InvalidArgument
from recurx.experiments import printed
from recurx.experiments.answering import arc
from recurx.experiments.answering.refinement import Refining, arguments_of_solve
from recurx.experiments.tasks.arc import files as arc_files
from recurx.options import file, option

if TYPE_CHECKING:
    from rich.console import Console

    from recurx.experiments.tasks.questions import Questions
    from recurx.models import RecursiveModel
    from recurx.tasks import Task
    from recurx.train import Report
    from recurx.train.ranks import Ranks

MISLED = 0.01  # accuracy that halting costs before it is called too early


@dataclass(frozen=True)
class Options(options.Json, options.Machine, Refining, arc.Options, options.Weights):
    task: str | None = option(None, "default: that of the checkpoint", flag="", nargs="?")
    puzzles: str | None = file("Sudokus or mazes in lines, grids or a CSV; ARC: a file or folder "
                               "of tasks")  # fmt: skip
    count: int | None = option(
        None,
        "at most N puzzles (default: 512 held-out ones, or the whole file)",
        least=1,
        most=10**7,
    )
    batch_size: int = option(256, "puzzles that are solved at once", least=1)
    out: str | None = file("of --puzzles: write a line of JSON for each batch; a run that was "
                           "killed goes on, torchrun shares the work, and a file of any length "
                           "is read piece by piece")  # fmt: skip
    curve: str | None = file("draw exact accuracy against supervision steps and wall time, with "
                             "lines for 1, 2, 4 ... --rollouts (.png, .svg)")  # fmt: skip
    compare_exit: bool = option(False, "time halting rules against always --max-steps steps")
    grades: bool = option(False, "Sudoku: also by hardness, beside a classical solver")
    budget_count: int = option(
        1024, "puzzles of --curve, --compare-exit and the rule of training at most", least=1
    )


def run(asked: Options) -> int:
    from recurx.bench import budgets
    from recurx.bench.budgets import shown
    from recurx.cli import output
    from recurx.experiments.answering import grades, reports
    from recurx.experiments.answering.checkpoints import open_checkpoint
    from recurx.train import evaluate
    from recurx.train.ranks import join_torchrun

    asked = options.local_device(asked)
    device = asked.prepare()
    ranks = join_torchrun(device)
    picture = shown.check_path(asked.curve) if asked.curve else None
    check_writable(asked.submission)
    names = arc.names_of_rows(asked)
    rows = None if names is None else len(arc_files.read_names(names))
    model, task, loaded = open_checkpoint(asked.checkpoint, asked.task, device, asked.backend, rows)
    recommended = loaded.extra.get("solve") or {}
    how = arguments_of_solve(asked.how, recommended, task)
    console = output.make_console(quiet=not ranks.first)
    if asked.checkpoint is None:
        console.print(f"the net that ships for {task.name}: {loaded.path}", soft_wrap=True)
    for name, why in loaded.assumed.items():
        console.print(f"assumed {name}={getattr(loaded.config, name)!r}: {why}")
    if recommended:
        console.print(f"the net recommends {recommended}", soft_wrap=True)
    as_trained = _as_trained(asked.how, recommended, how, loaded.config.halt_max_steps)
    console.print(_rule(how, as_trained), soft_wrap=True)
    if arc.applies(asked, task):
        if asked.puzzles is not None:
            task = arc_files.task(asked.puzzles, names, task)
        return arc.evaluate(asked, model, task, str(loaded.path), how, console, device)
    if asked.out:
        return _piece_by_piece(asked, model, task, str(loaded.path), how, ranks, console)
    if not ranks.first:
        return 0  # without --out there is nothing to share
    given = _given(console, asked, task)
    console.print(f"{len(given.examples)} puzzles {given.source}", soft_wrap=True)
    where: dict[str, Any] = {"batch_size": asked.batch_size, "device": device}
    total = len(given.examples)
    with (
        output.counting(console, "solved") as show,
        advancing(model, asked.batch_size, how, lambda done: show(done, total)) as on_batch,
    ):
        where["on_batch"] = on_batch
        if asked.grades:
            graded = grades.evaluate_by_grade(model, task, given, **where, **how)
            report = reports.merged([row.report for row in graded])
        else:
            report = evaluate(model, task, given.examples, known=given.known, **where, **how)
    del where["on_batch"]
    _print_report(console, report, how)
    result = {"task": task.name, "checkpoint": str(loaded.path)} | report.to_dict()
    result |= {"answers_seconds": given.seconds, "halt": how["halt"]}
    few = given.examples.take(slice(asked.budget_count))
    if as_trained is not None:
        trained, steps = evaluate(model, task, few, **where, **as_trained), as_trained["max_steps"]
        _print_trained(console, report, trained, steps)
        result["as_trained"] = {"max_steps": steps, "count": trained.count, "exact": trained.exact}
    if asked.compare_exit:
        exits = budgets.compare_exits(model, task, few, max_steps=how["max_steps"], **where)
        console.print(output.table(*shown.exits_table(exits, len(few))))
        console.print(shown.fastest(exits), soft_wrap=True)
        result["exits"] = [asdict(row) for row in exits]
    if asked.grades:
        console.print(grades.shown(graded))
        result["grades"] = [asdict(row) for row in graded]
    if picture is not None:
        steps, tries = budgets.doubling(how.pop("max_steps")), budgets.doubling(how.pop("rollouts"))
        points = budgets.budget_curve(model, task, few, steps, tries, **where, **how)
        console.print(output.table(*shown.points_table(points, len(few))))
        shown.write(
            picture, f"{task.name}, {len(few)} puzzles, {Path(loaded.path).stem}",
            lambda figure: shown.draw_budgets(points, figure, loaded.config.halt_max_steps),
        )  # fmt: skip
        console.print(f"curve: {picture}", soft_wrap=True)
        result["points"] = [asdict(point) for point in points]
    if asked.json:
        output.json_line(result)
    return 0


def _piece_by_piece(
    asked: Options, model: RecursiveModel, task: Task, checkpoint: str, how: dict[str, Any],
    ranks: Ranks, console: Console,
) -> int:  # fmt: skip
    """The report of a file of any length, whose parts are lines of `asked.out`."""
    from recurx.cli import output
    from recurx.experiments.answering import boards_out, journal, reports
    from recurx.experiments.tasks import questions
    from recurx.train import evaluate

    others = ("curve", "compare_exit", "grades")
    if not asked.puzzles or any(getattr(asked, name) for name in others):
        raise InvalidArgument(f"--out: with --puzzles, without {options.flags(others)}.")
    device = next(model.parameters()).device
    rows = boards_out.together(model, asked.batch_size)

    def work(number: int, part: Questions) -> tuple[list[str], Counter[str]]:
        first = number * asked.batch_size
        report = evaluate(
            model, task, part.examples, known=part.known, batch_size=rows,
            first_sample=first, device=device, **how,
        )  # fmt: skip
        exact = round(report.exact * report.count)
        told = Counter({"exact": exact, "not": report.count - exact})
        return [json.dumps({"first": first} | report.to_dict())], told

    job = {"kind": "eval", "count": asked.count} | boards_out.job(asked, task, checkpoint, how)
    with journal.opened(asked.out, ranks, 1, "", job) as (file, resumed):
        parts = questions.stream(asked.puzzles, task, asked.batch_size, asked.count)
        journal.run(
            parts, lambda part: len(part.examples), work, file, ranks, resumed,
            boards_out.saying(console),
        )  # fmt: skip
        if file is None:
            return 0
        report = reports.merged([reports.of(json.loads(line)) for line in file.lines()])
    _print_report(console, report, how)
    if asked.json:
        output.json_line({"task": task.name, "checkpoint": checkpoint} | report.to_dict())
    return 0


@contextmanager
def advancing(
    model: RecursiveModel, size: int, how: Mapping[str, Any], show: Callable[[int], object]
) -> Iterator[Callable[[int], None]]:
    """An `on_batch` of `train.evaluate` whose `show` moves within a batch, too: with each step, by
    the rows that ended or by the share of the steps, whichever is more. A batch may take minutes.
    """
    finished, step, first = 0, 0, 0  # puzzles, step of the batch, its rows at the start

    def on_step(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal step, first
        rows = len((kwargs.get("carry") or args[0]).halted)
        first = first if step else rows
        share = max(1 - rows / max(first, 1), min(step / how["max_steps"], 1))
        step += 1
        show(finished + int(share * min(size, first // tries)))

    def on_batch(done: int) -> None:
        nonlocal finished, step
        finished, step = done, 0
        show(done)

    tries = 1 if callable(how.get("select")) else how["rollouts"]  # rows of a puzzle at once
    hook = model.register_forward_pre_hook(on_step, with_kwargs=True)
    try:
        yield on_batch
    finally:
        hook.remove()


def _given(console: Console, asked: Options, task: Task) -> Questions:
    from recurx.experiments.tasks import questions
    from recurx.tasks import Sampler

    if asked.puzzles is not None:
        return questions.read(asked.puzzles, task, asked.count, console.print)
    sampler = Sampler(task, asked.how.get("seed", 0), "held-out")
    examples = sampler.draw_distinct(asked.count or 512)
    return questions.Questions(examples, None, f"held out: {task.held_out_rule}")


# ---- which rule halts, and what training's would give ------------------------------------------


def _as_trained(
    said: Mapping[str, Any], recommended: Mapping[str, Any], how: dict[str, Any], trained: int
) -> dict[str, Any] | None:
    """The arguments that `train` evaluates with: all steps, none halted early. None where somebody
    chose how puzzles end, so that there is no default to mislead."""
    if {"halt", "halt_above", "fill", "fill_every"} & {*said, *recommended}:
        return None
    return {**how, "halt": None, "max_steps": said.get("max_steps", trained)}


def _rule(how: Mapping[str, Any], as_trained: Mapping[str, Any] | None) -> str:
    """A line that says when a puzzle ends, and how to ask for the rule of training."""
    sure, still = f"at q > {how['halt_above']:g}", f"at {how['patience'] + 1} equal answers"
    rule = {None: "never", "q": sure, "fixed-point": still, "any": f"{sure} or {still}"}
    rule |= {n: f"at {n} < {how['halt_below']:g}" for n in ("residual", "entropy")}
    text = f"halts  {rule[how['halt']]}, after {how['max_steps']} steps at most (--halt "
    if as_trained is None:
        return f"{text}{how['halt'] or 'none'})"
    steps = as_trained["max_steps"]
    return f"{text}q, the default; as `train` evaluates: --halt none --max-steps {steps})"


def _print_trained(console: Console, report: Report, trained: Report, steps: int) -> None:
    """Beside the accuracy of the halting rule, that of the rule of training."""
    few = "" if trained.count == report.count else f" of the first {trained.count:,}"
    console.print(
        f"as `train` evaluates, all {steps} steps: {trained.exact:.2%} exact{few} "
        f"(--halt none --max-steps {steps})"
    )
    if trained.exact > report.exact + MISLED:
        console.print(
            "This net's q ends puzzles too early: let it take all steps, as above, or ask for more "
            "certainty, as in --halt-above 2."
        )


# ---- what is printed ---------------------------------------------------------------------------


def _print_report(console: Console, report: Report, how: dict[str, Any]) -> None:
    cells = "unknown" if report.cells is None else f"{report.cells:.2%}"
    console.print(f"exact  {report.exact:.2%} (by the rules and the givens)")
    console.print(f"cells  {cells}")
    each = "a rollout" if how["rollouts"] > 1 or how.get("search") else "each"
    if report.verdicts:
        told = ", ".join(f"{name} {count}" for name, count in sorted(report.verdicts.items()))
        console.print(f"search {told}; wrong ones among the solved: {report.wrong}")
    console.print(f"steps  {report.steps_mean:.2f} a puzzle, at most {how['max_steps']} {each}")
    console.print(f"time   {report.seconds:.2f} s")
    console.print("exact accuracy if refinement stopped after")
    console.print(printed.curve(report.curve))
    taken = ", ".join(f"{steps}: {count}" for steps, count in report.histogram.items())
    console.print(f"steps taken  {taken}", soft_wrap=True)
