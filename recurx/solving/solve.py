"""`recurx.solve`: refinement at test time. Supervision steps, early exit, rollouts.

Finished rows leave the batch: no row is computed after it halts, so a batch costs what its samples
need and not 16 times its size. With `halt=None` every row takes all the steps and the answers are
those of the official evaluation loop, bit for bit. NOTE: with early exit the batch shrinks, and
kernels may round differently at another batch size; low bits can differ, as between any two sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recurx.backends.weight_cache import frozen_weights
from recurx.errors import bad_argument
from recurx.solving import on_cpu
from recurx.solving import rollouts as tries
from recurx.solving.asking import evaluating
from recurx.solving.halting_loop import Answers, refine
from recurx.solving.options import HALTS, INITS, SELECTIONS, Accepts, Fill, Rules, Search
from recurx.solving.search import search as search_by_rules

__all__ = ["Answers", "Fill", "Search", "solve"]


@torch.no_grad()
def solve(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    max_steps: int = Rules.max_steps,
    halt: str | None = Rules.halt,
    rollouts: int = Rules.rollouts,
    sigma: float = Rules.sigma,
    select: str | Accepts = Rules.select,
    *,
    backend: str | None = None,
    halt_above: float = Rules.halt_above,
    halt_below: float = Rules.halt_below,
    patience: int = Rules.patience,
    init: str = Rules.init,
    init_scale: float = Rules.init_scale,
    seed: int = Rules.seed,
    first_sample: int = Rules.first_sample,
    logits: bool = False,
    trace: bool = False,
    fill: Fill | Mapping[str, Any] | None = None,
    search: Search | None = None,
    progress: Callable[[int], None] | None = None,
) -> Answers:
    """Answer a batch with at most `max_steps` supervision steps a sample, without gradient.

    Args:
        model: a recurx TRM or HRM, or an official one (patched or not), inside a loss head, DDP or
            `torch.compile` or not. Runs in evaluation mode, whatever its own; of recurx's models
            nothing is changed for that, so that several threads may ask one model
            (recurx/solving/asking.py). Its weights are packed for the kernels once: nobody may
            write to them meanwhile.
        batch: "inputs" [B, T] integers, and "puzzle_identifiers" [B] (zeros if absent).
        max_steps: budget a sample; it may exceed the steps the model was trained with.
        halt: "q" ends a row as training does (q_halt > 0, or q_halt > q_continue with Q-learning);
            "fixed-point" ends it when its predicted answer did not change for `patience` steps;
            "any" at whichever of the two comes first; None runs every row to the budget. Below
            `halt_below`: "residual", |change| / |state| in a step of what the heads read (FPRM,
            arXiv 2606.18206), and "entropy" of the tokens in nats; means over tokens.
        backend: what runs the recursion; None for what the model runs on. With "cuda" all steps of
            all rows are one launch: a row that halts makes room for the next inside the kernel, and
            nothing waits for the host (recurx/solving/on_cuda.py). It halts by q or budget,
            from the learned start; all else is refused, and runs with backend None on a model
            whose own backend is "cuda".
        halt_above: how far q_halt must exceed that limit. It is a logit of "this answer is right":
            0 halts at even odds, 3 at 20 to 1, for more steps and fewer wrong answers.
        patience: steps without a change that a fixed point takes; 2 ends a row after three equal
            answers.
        rollouts: copies R of each sample, from which `select` picks. They differ by `sigma`, by
            `init`, or not at all.
        sigma: standard deviation of the noise that is added to the answer state before each step
            (PTRM).
        init: where rollouts start: "learned", all at the learned states; "random", every one but
            the first at states of its own, drawn as initial states are, for every token and channel
            (EqR, arXiv 2605.21488). A single rollout always has the learned start.
        init_scale: standard deviation of random initial states.
        select: "q" picks the rollout with the highest q; "vote" the most frequent whole answer,
            the one with the highest q among equals; "residual" that which moved least in its last
            step (EqR). A function (inputs [N, T], answers [N, T]) ->
            bool [N] that can tell right answers without a label, as `recurx.tasks.get(...).accepts`
            does by the rules: rollouts are tried in turn until it accepts one (with backend "cuda"
            all in one launch), and if it accepts none, the one with the highest q is picked.
        seed: of the noise, a counter-based stream of its own for every row and step
            (recurx/solving/noise.py): the same seed gives the same noise on any device and backend.
        first_sample: number of the batch's first sample in that stream, so that a sample's noise
            does not depend on how a data set is cut into batches.
        logits, trace: also return them (see `Answers`).
        fill: fill blanks in the order of confidence, instead of reading the answer all at once
            (`recurx.Fill`, or its fields as a mapping). For hard questions, at many more steps.
            Fill every so many `steps` as the net was trained with, or more, and let `halt="q"` end
            it, unless the net was trained on questions with few blanks too.
        search: search over tries by the rules of a task (`recurx.Search`), in place of `rollouts`
            and `select`, which are not used then. The first try of a sample has no noise and the
            learned start; the others differ by `sigma` or `init`, one of which must be said.
        progress: called now and then with how many rows (rollouts of samples) have ended so far;
            of a search, after each round with how many samples are done.

    Raises:
        InvalidArgument: a bad argument, or a model without the ACT interface.
        BackendUnavailable: `backend` cannot run this model here; the message says why.
    """
    rules = Rules(
        max_steps, halt, halt_above, halt_below, patience, rollouts, sigma, init, init_scale,
        select, seed, first_sample, logits, trace, _fill(fill),
    )  # fmt: skip
    _check(rules)
    _check_search(search, rules)
    model = _act_model(model)
    data = _complete(batch)
    in_kernel = backend == "cuda" and len(data["inputs"])
    with evaluating(model, None if in_kernel else backend) as how, frozen_weights():
        if in_kernel:
            from recurx.solving import on_cuda

            if search is not None:
                # NOTE: its noise counts the boards of a round, so it follows from the batch too.
                asks = lambda rows, samples, rules: on_cuda.refine(model, rows, rules)  # noqa: E731
                return search_by_rules(asks, data, rules, search, progress)
            found = on_cuda.refine(model, data, rules)
            return tries.pick(found, data["inputs"], rollouts, select)

        def runner(rules: Rules, told: Callable[[int], None] | None) -> tries.Run:
            loop = functools.partial(refine, model, rules=rules, progress=told, **how)
            return on_cpu.refiner(model, data, rules, how, loop, told)

        if search is not None:
            asks = functools.partial(tries.of_samples, lambda rules: runner(rules, None))
            return search_by_rules(asks, data, rules, search, progress)
        run = runner(rules, progress)
        if callable(select):
            return tries.in_turn(run, data, rollouts, select)
        return tries.at_once(run, data, rollouts, select)


# ---- the model's side --------------------------------------------------------------------------


def _act_model(model: nn.Module) -> Any:
    """The ACT wrapper itself, inside loss heads, DDP and whatever else wraps it."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        inner = getattr(module, "inner", None)
        if hasattr(module, "initial_carry") and hasattr(inner, "reset_carry"):
            return module
    hint = "Use recurx.models.TRM, or an official model."
    if hasattr(model, "lenet"):
        hint = "This is nano-trm's: recurx.patch it and run its own validation."
    raise bad_argument(
        "solve", "model", "a TRM or HRM with initial_carry() and inner.reset_carry()",
        type(model).__name__, hint,
    )  # fmt: skip


def _complete(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(batch, Mapping):
        raise bad_argument(
            "solve", "batch", 'a mapping with "inputs", token ids [B, T]', type(batch).__name__,
            'Of Examples: {"inputs": torch.from_numpy(examples.inputs), "puzzle_identifiers": '
            "torch.from_numpy(examples.identifiers)}, some dozens at once.",
        )  # fmt: skip
    inputs = batch.get("inputs")
    if not isinstance(inputs, Tensor) or inputs.ndim != 2 or inputs.is_floating_point():
        got = f"{inputs.dtype} {list(inputs.shape)}" if isinstance(inputs, Tensor) else repr(inputs)
        raise bad_argument("solve", "batch['inputs']", "integer token ids [B, T]", got)
    identifiers = batch.get("puzzle_identifiers")
    if identifiers is None:
        identifiers = torch.zeros(len(inputs), dtype=torch.int32, device=inputs.device)
    elif identifiers.is_floating_point() or identifiers.dtype is torch.bool:
        raise bad_argument(
            "solve", "batch['puzzle_identifiers']", "integer ids [B]", identifiers.dtype
        )
    elif identifiers.dtype is torch.uint8:  # which indexing takes for a mask
        identifiers = identifiers.to(torch.int32)
    return {**batch, "puzzle_identifiers": identifiers}


def _fill(fill: Fill | Mapping[str, Any] | None) -> Fill | None:
    if fill is None:
        return None
    known = "recurx.Fill(blank=, above=, steps=), or these fields as a mapping"
    try:
        found = fill if isinstance(fill, Fill) else Fill(**fill)
    except TypeError as error:
        raise bad_argument("solve", "fill", known, repr(fill)) from error
    counts = (found.blank, found.steps)
    if any(isinstance(n, bool) or not isinstance(n, int) for n in counts) or found.steps < 1:
        raise bad_argument("solve", "fill", "an int `blank`, and `steps` >= 1", repr(found))
    if not 0 <= found.above <= 1:
        raise bad_argument("solve", "fill", "a probability `above`", repr(found))
    return found


def _check_search(search: Search | None, rules: Rules) -> None:
    if search is None:
        return
    if not isinstance(search, Search):
        raise bad_argument("solve", "search", "recurx.Search(task, ...)", repr(search))
    least = {"starts": 2, "budget": 1, "positions": 1}
    wrong = [n for n, least_ in least.items() if not _whole(getattr(search, n), least_)]
    by = search.rules
    lacks = [name for name in ("accepts", "blank", "possible", "count") if not hasattr(by, name)]
    differ = search.budget == 1 or rules.sigma or rules.init != "learned"
    for holds, arg, wanted, got in (
        (not wrong, f"search.{'/'.join(wrong)}", f"ints of at least {least}", repr(search)),
        (search.pin > 0, "search.pin", "a share > 0", repr(search.pin)),
        (not lacks, "search.rules", "a task of recurx.tasks", f"one without {', '.join(lacks)}"),
        (getattr(by, "has_rules", True), "search.rules", "a task that has rules", repr(by)),
        (not search.unique or getattr(by, "counts", True), "search.unique",
         "False for a task without an exact solver", "True"),
        (differ, "search", "tries that differ, by sigma=0.5, say, or init='random'", "neither"),
        (not rules.logits, "logits", "False with `search`", "True"),
    ):  # fmt: skip
        if not holds:
            raise bad_argument("solve", arg, wanted, got)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check(rules: Rules) -> None:
    counts = {"max_steps": 1, "rollouts": 1, "patience": 1, "first_sample": 0}
    for arg, least in counts.items():
        value = getattr(rules, arg)
        if not _whole(value, least):
            raise bad_argument("solve", arg, f"an int >= {least}", repr(value))
    for arg, known in (("halt", HALTS), ("init", INITS)):
        if getattr(rules, arg) not in known:
            raise bad_argument("solve", arg, f"one of {known}", repr(getattr(rules, arg)))
    for arg in ("sigma", "init_scale", "halt_below"):
        value = getattr(rules, arg)
        if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise bad_argument("solve", arg, "a finite number >= 0", repr(value))
    above = rules.halt_above
    if not isinstance(above, (int, float)) or above != above:
        raise bad_argument("solve", "halt_above", "a number", repr(above))
    if not callable(rules.select) and rules.select not in SELECTIONS:
        raise bad_argument(
            "solve", "select", f"one of {SELECTIONS}, or a function that checks answers",
            repr(rules.select), "For the rules of a task pass recurx.tasks.get(...).accepts; for "
            "what a checkpoint recommends, its `.recommended`.",
        )  # fmt: skip
