"""Search over rollouts: `recurx.solve(..., search=recurx.Search(task, ...))`.

Each sample has a stack of boards: its question, with some blanks filled. In a round every sample
that is not done gives its topmost board, and all tries of all these boards are one batch. What the
tries of a board say is turned into further boards by the rules of the task:

    a try keeps the rules            the sample is done
    else, under the old boards:      one board for each token that the rules leave in one cell (the
                                     one on which the tries agree least), the likeliest topmost,
    and on top of these:             the board with all cells filled on which the tries agree

A board without an answer, which the rules see, is never put to the net. The boards of one cell are
all that the rules leave, so an empty stack proves that the question has no answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recurx.errors import bad_argument
from recurx.solving.halting_loop import Answers
from recurx.solving.options import Rules, Search
from recurx.solving.rollouts import as_long, checked, rank

# (data of n boards, the [n] numbers of their samples, rules) -> n * rules.rollouts rows
Ask = Callable[[Mapping[str, Tensor], Tensor, Rules], Answers]

SOLVED, CONTRADICTORY, AMBIGUOUS, BUDGET = "solved", "contradictory", "ambiguous", "budget"
SEEDS = 0x9E3779B97F4A7C15  # between the noise of two rounds
AGAIN = 4  # every so many rounds a sample's own question is tried, lest wrong cells hold it up
HALVINGS = 4  # of the cells that are filled together, until the rules see no contradiction
Stacks = dict[int, list[Tensor]]  # sample -> its boards [T], the next one last


@dataclass
class _Found:
    """What is known of the samples so far; `answers` holds what the tries said, `met` the boards
    that ever were on a sample's stack: one that is met again needs no second place there."""

    verdicts: list[str]
    answers: Answers
    met: list[set[bytes]]


def search(
    ask: Ask, data: Mapping[str, Tensor], rules: Rules, how: Search,
    progress: Callable[[int], None] | None = None,
) -> Answers:  # fmt: skip
    """The answers of B samples, and why others have none; see `recurx.solve`.

    Args:
        progress: called after each round with how many samples are done.
    """
    inputs = data["inputs"]
    device, count = inputs.device, len(inputs)
    found = _Found([BUDGET] * count, _nothing(inputs, count, how, rules), [set() for _ in inputs])
    stacks: Stacks = {sample: [board] for sample, board in enumerate(inputs)}
    left = _possible(how, inputs)
    if left is not None:
        _end(found, stacks, _dead(left).nonzero()[:, 0].tolist(), CONTRADICTORY)
    for turn in range(how.budget):
        if not stacks:
            break
        samples = torch.tensor(list(stacks), device=device)
        again = turn % AGAIN == 0  # the first round too: its board stays where it is
        boards = torch.stack([inputs[i] if again else stacks[i].pop() for i in stacks])
        asked = replace(
            rules, rollouts=how.starts if turn else 1, sigma=rules.sigma if turn else 0.0,
            init=rules.init if turn else "learned", seed=(rules.seed + turn * SEEDS) % 2**63,
        )  # fmt: skip
        rows = {key: value[samples] for key, value in data.items()} | {"inputs": boards}
        tried = ask(rows, samples, asked)
        tries = _tries(tried.predictions, boards, how, asked.rollouts)
        accepted = _judge(how, inputs[samples], tries)
        if not turn:
            found.answers = _nothing(tries[:, 0], count, how, rules)
        found.answers = _keep(found.answers, samples, boards, tried, tries, accepted, turn, how)
        _end(found, stacks, samples[accepted.any(1)].tolist(), SOLVED)
        if how.unique and not turn:
            _judge_questions(found, stacks, inputs, how)
        open_ = torch.tensor([int(sample) in stacks for sample in samples], device=device)
        if open_.any():
            part = samples[open_], boards[open_], tries[open_]
            _grow(found, stacks, inputs, *part, how, branch=not again)
        if progress is not None:
            progress(count - len(stacks))
    return _said(found)


def _nothing(like: Tensor, count: int, how: Search, rules: Rules) -> Answers:
    """Answers to `count` samples before anything is tried; `like` [n, T] is as long as one."""
    steps = like.new_zeros(count, dtype=torch.int64)
    predictions = steps.new_zeros(count, like.shape[1])
    return Answers(
        predictions, steps, torch.full((count,), -torch.inf, device=like.device), steps.bool(),
        steps.new_zeros(count, 1 + (how.budget - 1) * how.starts),
        trace=predictions[None].clone() if rules.trace else None,
    )  # fmt: skip


# ---- what the rules say ------------------------------------------------------------------------


def _possible(how: Search, boards: Tensor) -> Tensor | None:
    """[N, T, vocab] which tokens the rules leave; None where they do not tell."""
    return how.rules.possible(boards) if len(boards) else None


def _dead(left: Tensor) -> Tensor:
    """[N] whether a cell has no token left."""
    return ~left.any(-1).all(-1)


def _judge(how: Search, inputs: Tensor, tries: Tensor) -> Tensor:
    """[n, R] which of the tries [n, R, T] keep the rules."""
    every = inputs.repeat_interleave(tries.shape[1], dim=0)
    return checked(how.rules.accepts, every, tries.flatten(0, 1)).view(tries.shape[:2])


def _judge_questions(found: _Found, stacks: Stacks, inputs: Tensor, how: Search) -> None:
    """End the samples whose question the task's exact solver finds not to have one answer."""
    told = [i for i, verdict in enumerate(found.verdicts) if verdict != CONTRADICTORY]
    counts = how.rules.count(inputs[told], how.positions)
    for sample, answers in zip(told, counts.tolist(), strict=True):
        if answers != 1:
            verdict = {0: CONTRADICTORY, -1: BUDGET}.get(answers, AMBIGUOUS)
            _end(found, stacks, [sample], verdict)


# ---- what the tries say ------------------------------------------------------------------------


def _tries(predictions: Tensor, boards: Tensor, how: Search, rollouts: int) -> Tensor:
    """[n, R, T] the answers, with what a board has filled as it is there."""
    tries = predictions.view(len(boards), rollouts, -1)
    if how.rules.blank is None:
        return tries
    if tries.shape[2:] != boards.shape[1:]:
        raise bad_argument(
            "solve", "search", "a model whose answers are as long as its questions",
            f"{tries.shape[2]} tokens for {boards.shape[1]}",
        )  # fmt: skip
    return torch.where(boards[:, None] == how.rules.blank, tries, boards[:, None])


def _keep(
    answers: Answers, samples: Tensor, boards: Tensor, tried: Answers, tries: Tensor,
    accepted: Tensor, turn: int, how: Search,
) -> Answers:  # fmt: skip
    """Write down what the tries of a round took, and the best one of each sample."""
    rollouts = tries.shape[1]
    first = 1 + (turn - 1) * how.starts if turn else 0
    answers.rollout_steps[samples, first : first + rollouts] = tried.steps.view(-1, rollouts)
    score = rank(tried.q).view(-1, rollouts)
    best = torch.where(accepted, torch.inf, score).argmax(1)  # argmax takes the first of equals
    pick = torch.arange(len(samples), device=samples.device)
    rows = pick * rollouts + best
    answers.predictions[samples] = tries[pick, best]
    for name in ("steps", "q", "halted"):
        getattr(answers, name)[samples] = getattr(tried, name)[rows]
    if tried.trace is not None and answers.trace is not None:
        longest = max(len(answers.trace), len(tried.trace))
        trace = as_long(answers.trace, longest).clone()
        later = as_long(tried.trace, longest)[:, rows]
        if how.rules.blank is not None:
            later = torch.where(boards == how.rules.blank, later, boards)
        trace[:, samples] = later
        return replace(answers, trace=trace)
    return answers


def _end(found: _Found, stacks: Stacks, samples: list[int], verdict: str) -> None:
    for sample in samples:
        found.verdicts[sample] = verdict
        stacks.pop(sample, None)


# ---- further boards ----------------------------------------------------------------------------


def _grow(
    found: _Found, stacks: Stacks, inputs: Tensor, samples: Tensor, boards: Tensor, tries: Tensor,
    how: Search, branch: bool,
) -> None:  # fmt: skip
    """Put on the stacks of `samples` what follows from the tries [n, R, T] of their boards.

    Args:
        branch: also one board for each token of a cell; else the boards are still on the stacks.
    """
    blank, rollouts = how.rules.blank, tries.shape[1]
    if blank is None:  # ask the same once more, by other tries
        for sample in samples.tolist() if branch else ():
            stacks[sample].append(inputs[sample])
        return
    if rollouts == 1:  # one try agrees with itself
        return
    left = _possible(how, boards)
    vocab = int(tries.max()) + 1 if left is None else left.shape[-1]
    known = tries < vocab  # a model may have tokens that the task has not
    votes = boards.new_zeros(*boards.shape, vocab, dtype=torch.int64)
    votes.scatter_add_(2, tries.masked_fill(~known, 0).mT, known.mT.long())
    votes[..., blank] = 0
    allowed = votes > 0 if left is None else left
    votes = votes * allowed
    top, token = votes.max(-1)
    token = token.to(boards.dtype)
    unfilled = boards == blank
    options = allowed.sum(-1)
    # The cell on which the tries agree least; of equals, the one with the fewest tokens left. One
    # that has a single token is no choice, and comes last.
    score = top * (vocab + 1) + options + (options == 1) * 2**32
    cell = torch.where(unfilled, score, 2**62).argmin(1)
    here = torch.arange(len(boards), device=boards.device)
    row, value = (allowed[here, cell] & unfilled[here, cell][:, None]).nonzero(as_tuple=True)
    likeliest_last = (row * (rollouts + 1) + votes[row, cell[row], value]).argsort(stable=True)
    row, value = row[likeliest_last], value[likeliest_last]
    row, value = (row, value) if branch else (row[:0], value[:0])
    children = boards[row]
    children[torch.arange(len(row), device=row.device), cell[row]] = value.to(boards.dtype)

    filled = unfilled & (top >= how.pin * rollouts) & (top > 0)  # none for a `pin` over 1
    for halving in range(HALVINGS):
        pinned = torch.where(filled, token, boards)
        after = _possible(how, pinned)
        if after is None or not (dead := _dead(after)).any():
            break
        # Every second cell, and at last none: which of them are wrong nobody knows.
        odd = filled.cumsum(1) % 2 == 1
        filled &= ~dead[:, None] | (odd & (halving + 1 < HALVINGS))
    pinned = torch.where(filled, token, boards)
    new = filled.any(1)
    owners = torch.cat([samples[row], samples[new]])
    grown = torch.cat([children, pinned[new]])
    after = _possible(how, grown)
    alive = torch.ones_like(owners, dtype=torch.bool) if after is None else ~_dead(after)
    if after is not None and how.forced:
        only = after.int().argmax(-1).to(grown.dtype)
        grown = torch.where((grown == blank) & (after.sum(-1) == 1), only, grown)
    whole = alive & (grown != blank).all(1)
    right = torch.zeros_like(whole)
    if whole.any():
        right[whole] = checked(how.rules.accepts, inputs[owners[whole]], grown[whole].long())
    for sample, board in zip(owners[right].tolist(), grown[right], strict=True):
        found.answers.predictions[sample] = board
        _end(found, stacks, [sample], SOLVED)
    for at in (alive & ~whole).nonzero()[:, 0].tolist():
        sample, mark = int(owners[at]), grown[at].cpu().numpy().tobytes()
        if sample in stacks and mark not in found.met[sample]:
            found.met[sample].add(mark)
            stacks[sample].append(grown[at])
    empty = [sample for sample in samples.tolist() if sample in stacks and not stacks[sample]]
    # Rules that tell what is possible have refuted all boards there are.
    _end(found, stacks, empty, BUDGET if left is None else CONTRADICTORY)


def _said(found: _Found) -> Answers:
    """The answers, with padding in place of those that do not count."""
    solved = torch.tensor([verdict == SOLVED for verdict in found.verdicts], dtype=torch.bool)
    predictions = found.answers.predictions
    if found.answers.trace is not None:  # a board that the rules completed is no try's
        found.answers.trace[-1] = predictions
    predictions[~solved.to(predictions.device)] = 0
    return replace(found.answers, verdicts=tuple(found.verdicts))
