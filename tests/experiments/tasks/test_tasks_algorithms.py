"""Chains, permutations, graphs: answers agree with plain programs, checkers with the truth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recurx import InvalidArgument, tasks
from recurx.experiments.tasks import Chain, Reach
from recurx.experiments.tasks.reach import EDGE, HERE, NO_EDGE, NO_WAY

seeds = st.integers(0, 2**32 - 1)


def generated(name: str, seed: int, count: int = 5) -> tuple[tasks.Task, tasks.Examples]:
    task = tasks.get(name)
    return task, task.generate(np.random.default_rng(seed), count)


@settings(max_examples=20)
@given(seeds, st.integers(3, 12))
def test_chain_counts_hops(seed: int, length: int) -> None:
    task, drawn = generated(f"chain:length={length}", seed)
    for follower, answer in zip(drawn.inputs - 1, drawn.answers - 1, strict=True):
        for node in range(length):
            here, hops = node, 0
            while follower[here] != here:
                here, hops = follower[here], hops + 1
            assert answer[node] == hops
    images = task.augment(np.random.default_rng(seed), drawn)
    assert task.check(images.inputs, images.answers).all()


def test_chain_checker_refuses_a_shift_and_has_no_answer_on_a_cycle() -> None:
    task, drawn = generated("chain:length=5", 0, 20)
    assert not task.check(drawn.inputs, drawn.answers + 1).any()
    assert not task.check(drawn.inputs, np.roll(drawn.answers, 1, axis=1)).any()
    cycle = np.array([[2, 3, 1]])  # 0 -> 1 -> 2 -> 0
    every = np.array(list(itertools.product(range(5), repeat=3)))
    assert not Chain(length=3).check(np.repeat(cycle, len(every), axis=0), every).any()


@settings(max_examples=20)
@given(seeds, st.integers(2, 5), st.integers(2, 8))
def test_compose_is_composition_from_left_to_right(seed: int, degree: int, length: int) -> None:
    task, drawn = generated(f"compose:degree={degree},length={length}", seed)
    group = list(itertools.permutations(range(degree)))
    assert task.vocab_size == len(group) + 1
    for word, products in zip(drawn.inputs - 1, drawn.answers - 1, strict=True):
        now = tuple(range(degree))
        for letter, product in zip(word, products, strict=True):
            now = tuple(group[letter][thing] for thing in now)
            assert group[product] == now
    images = task.augment(np.random.default_rng(seed), drawn)
    assert task.check(images.inputs, images.answers).all()
    assert (task.held_out(images) == task.held_out(drawn)).all()


def test_compose_checker_refuses_the_other_order() -> None:
    """b after a and a after b differ; the checker must not take one for the other."""
    task, drawn = generated("compose:length=6", 0, 50)
    other = drawn.inputs.copy() - 1
    for i in range(1, task.seq_len):
        other[:, i] = task._product[other[:, i], other[:, i - 1]]
    differs = (other + 1 != drawn.answers).any(axis=1)
    assert differs.sum() > 40
    assert not task.check(drawn.inputs, other + 1)[differs].any()
    assert not task.check(drawn.inputs, drawn.answers + task.vocab_size).any()


def test_compose_of_two_things_is_the_running_parity() -> None:
    _, drawn = generated("compose:degree=2,length=9", 3)
    assert (drawn.answers - 1 == (drawn.inputs - 1).cumsum(axis=1) % 2).all()


@settings(max_examples=20)
@given(seeds, st.integers(4, 10))
def test_reach_agrees_with_floyd_and_warshall(seed: int, nodes: int) -> None:
    task, drawn = generated(f"reach:nodes={nodes}", seed)
    for question, answer in zip(drawn.inputs, drawn.answers, strict=True):
        distance = np.where(question.reshape(nodes, nodes) == EDGE, 1, 1000)
        np.fill_diagonal(distance, 0)
        for k in range(nodes):
            distance = np.minimum(distance, distance[:, k, None] + distance[k])
        expected = np.where(distance < 1000, HERE + distance, NO_WAY)
        assert (answer.reshape(nodes, nodes) == expected).all()
    images = task.augment(np.random.default_rng(seed), drawn)
    assert task.check(images.inputs, images.answers).all()
    assert (task.held_out(images) == task.held_out(drawn)).all()


def test_reach_checker_refuses_answers_that_are_consistent_in_part() -> None:
    task, drawn = generated("reach:nodes=6", 0, 40)
    way = drawn.answers > HERE
    further = np.where(way, np.minimum(drawn.answers + 1, task.vocab_size - 1), drawn.answers)
    assert not task.check(drawn.inputs, further).any()
    cut = np.where(way & (drawn.inputs == NO_EDGE), NO_WAY, drawn.answers)  # direct edges only
    changed = (cut != drawn.answers).any(axis=1)
    assert changed.sum() > 30 and not task.check(drawn.inputs, cut)[changed].any()
    # A cycle 0 -> 1 -> 0 that claims a way to node 2: each node is one more than the other.
    small, question = Reach(nodes=4), np.full((1, 16), NO_EDGE)
    question[0, [1, 4]] = EDGE
    answer = task_answer = Reach(nodes=4)._example((question == EDGE).reshape(1, 4, 4)).answers
    assert Reach(nodes=4).check(question, task_answer)[0]
    for claim in itertools.product(range(1, 6), repeat=2):
        wrong = answer.copy()
        wrong[0, [2, 6]] = claim
        assert small.check(question, wrong)[0] == (claim == (NO_WAY, NO_WAY))


def test_split_of_graphs_tells_graphs_apart() -> None:
    task, drawn = generated("reach", 0, 800)
    assert 60 < task.held_out(drawn).sum() < 140  # an eighth


@pytest.mark.parametrize(
    "name", ["chain:length=2", "compose:degree=6", "compose:length=1", "reach:nodes=3"]
)
def test_sizes_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="expected"):
        tasks.get(name)
