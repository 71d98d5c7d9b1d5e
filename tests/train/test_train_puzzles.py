"""Training from a file of Sudokus: the honest split, the stream, the decay, the grid's start."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import recurx
import recurx.experiments.tasks
from recurx import tasks
from recurx.commands import main
from recurx.errors import InvalidArgument
from recurx.experiments.tasks import Sudoku
from recurx.experiments.tasks.sudoku import files, generate, symmetry
from recurx.experiments.tasks.sudoku import split as puzzles
from recurx.experiments.tasks.sudoku.layout import Layout, is_solution, to_boards
from recurx.models import TRM, starts
from recurx.train import Trainer, open_data, preset, saved_config, state

NINE = Layout.of(9)
TINY = {"hidden_size": 16, "num_heads": 2, "halt_max_steps": 3, "halt_exploration_prob": 0.5}
COUNT, CLUES = 24, 60


@pytest.fixture(scope="module")
def boards() -> tuple[np.ndarray, np.ndarray]:
    """Easy puzzles and their solutions."""
    return generate.puzzles(NINE, np.random.default_rng(5), COUNT, clues=CLUES)


@pytest.fixture
def file(tmp_path: Path, boards) -> Path:
    path = tmp_path / "puzzles.txt"
    path.write_text(lines(boards[0]))
    return path


def lines(rows: np.ndarray) -> str:
    return "".join("".join(map(str, row)) + "\n" for row in rows.tolist())


def config(path: Path, task: str = "sudoku", **changes):
    values = {"batch_size": 4, "hold_out": 5, "warmup": 2, "model": TINY, "seed": 3, **changes}
    return preset("tiny-mlp", task, puzzles=str(path), **values)


def split_of(config) -> puzzles.PuzzleSplit:
    return open_data(config).split


def differing(a: Trainer, b: Trainer) -> list[str]:
    left, right = (state._flatten(trainer._tensors_to_save()) for trainer in (a, b))
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


# ---- the split -----------------------------------------------------------------------------------


def test_the_held_out_part_is_the_published_function_of_the_file(file: Path, boards, tmp_path):
    split = split_of(config(file))
    # Written down, so that a numpy with another permutation is noticed: old lists must stay valid.
    assert np.random.default_rng(0).permutation(COUNT)[:5].tolist() == split.held_out.tolist()
    assert np.random.default_rng(0).permutation(41151)[:3].tolist() == [1795, 23151, 22756]
    assert (split.puzzles == boards[0]).all() and (split.answers == boards[1]).all()
    assert not set(split.train) & set(split.held_out)
    split.write_held_out(tmp_path / "held.txt")
    again = files.read(tmp_path / "held.txt", NINE)
    assert (again.puzzles == boards[0][split.held_out]).all()


def test_an_image_of_a_held_out_puzzle_is_not_trained_on(file: Path, boards) -> None:
    """Append images of one puzzle until one copy is held out and another is not."""
    rng = np.random.default_rng(1)
    image, _ = symmetry.random_images(NINE, rng, boards[0][[0] * 12], boards[1][[0] * 12])
    file.write_text(lines(np.concatenate([boards[0], image])))
    split = split_of(config(file))
    copies = {0, *range(COUNT, COUNT + 12)}
    assert copies & set(split.held_out.tolist())
    assert not copies & set(split.train.tolist())
    assert len(split.train) + len(split.held_out) < COUNT + 12
    with pytest.raises(InvalidArgument, match="every one that is not held out"):
        file.write_text(lines(image))
        split_of(config(file))


def test_drawn_puzzles_are_images_of_the_training_part_with_cells_revealed(file: Path) -> None:
    split = split_of(config(file))
    plain = puzzles.PuzzleSampler(split, seed=1).draw(200)
    helped = puzzles.PuzzleSampler(split, seed=1, reveal=6).draw(2000)
    for drawn in (plain, helped):
        assert is_solution(NINE, to_boards(drawn.inputs), to_boards(drawn.answers)).all()
        keys = {tuple(key) for key in symmetry.orbit_key(NINE, to_boards(drawn.answers))}
        train = symmetry.orbit_key(NINE, split.answers[split.train].astype(np.int64))
        assert keys == {tuple(key) for key in train}  # all of the training part, and nothing else
    assert ((to_boards(plain.inputs) > 0).sum(1) == CLUES).all()
    assert len(np.unique(plain.inputs, axis=0)) == 200
    extra = np.bincount((to_boards(helped.inputs) > 0).sum(1) - CLUES)
    assert len(extra) == 7 and (abs(extra - 2000 / 7) < 80).all()  # five sigma of a uniform number
    few = puzzles.PuzzleSampler(split, seed=1, reveal=81).draw(50)  # more than there are blanks
    assert is_solution(NINE, to_boards(few.inputs), to_boards(few.answers)).all()


def test_answers_of_the_file_are_used_and_checked(tmp_path: Path, boards) -> None:
    path = tmp_path / "extreme.csv"
    blank = np.where(np.arange(81) < 70, 0, boards[1])  # many solutions: only the file knows which
    table = zip(lines(blank).split(), lines(boards[1]).split(), strict=True)
    rows = [f"web,{q.replace('0', '.')},{a},7" for q, a in table]
    path.write_text("\n".join(["source,question,answer,rating", *rows]))
    split = split_of(config(path))
    assert (split.answers == boards[1]).all() and (split.puzzles == blank).all()
    swapped = str(rows[2]).replace(",7", ",8").replace("1", "x").replace("2", "1").replace("x", "2")
    rows[2] = swapped[:85] + rows[2][85:]  # another puzzle, the same answer
    path.write_text("\n".join(["source,question,answer,rating", *rows]))
    with pytest.raises(InvalidArgument, match="puzzle 3: the answer in the file breaks"):
        split_of(config(path))


@pytest.mark.parametrize(
    ("line", "says"),
    [("11" + "0" * 79, "no solution"), ("1" + "0" * 80, "more than one solution")],
)
def test_bad_puzzles_are_named(file: Path, line: str, says: str) -> None:
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(InvalidArgument, match=f"puzzle {COUNT + 1}: it has {says}"):
        split_of(config(file))


def test_refusals(file: Path) -> None:
    for changes, says in (
        ({"hold_out": COUNT}, "hold_out"),
        ({"hold_out": 0}, "hold_out"),
        ({"reveal": -1}, "reveal"),
        ({"task": "sudoku-6x6"}, "9x9"),
        ({"task": "sort"}, "a task that is trained on files, as sudoku .*got sort"),
    ):
        with pytest.raises(InvalidArgument, match=says):
            split_of(config(file, **changes))
    with pytest.raises(InvalidArgument, match="cannot read nowhere"):
        split_of(config(Path("nowhere")))
    with pytest.raises(InvalidArgument, match="without a file"):
        preset("tiny-mlp", "sudoku", reveal=3)


# ---- the run -------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_undisturbed_one_and_knows_its_file(file: Path, tmp_path) -> None:
    settings = config(file, reveal=9, lr_decay="cosine", decay_steps=8, grid_positions=True)
    whole = Trainer(settings)
    for _ in range(7):
        whole.train_step()
    folder = tmp_path / "run"
    Trainer(settings, folder).run(steps=3)
    moved = file.rename(tmp_path / "moved.txt")
    with pytest.raises(InvalidArgument, match="cannot read"):
        Trainer.resume(folder)
    resumed = Trainer.resume(folder, open_data(saved_config(folder), puzzles=moved))
    resumed.run(steps=7)
    assert differing(resumed, whole) == []
    assert resumed.data.state_dict() == whole.data.state_dict()
    assert len(resumed.held_out(99)) == 5 and len(resumed.held_out(2)) == 2
    other = Trainer.resume(folder, open_data(saved_config(folder), puzzles=moved))
    other.data.sampler.reveal = 8
    other.run(steps=30)  # planted: the comparison sees another stream
    whole.run(steps=30)
    assert differing(other, whole)
    moved.write_text(moved.read_text() + "# a comment\n")
    with pytest.raises(InvalidArgument, match="is not the file that this run trains on"):
        Trainer.resume(folder, open_data(saved_config(folder), puzzles=moved))
    train = json.loads(recurx.load_checkpoint(folder / "model.safetensors").extra["train"])
    assert train["puzzles"] == "moved.txt" and len(train["puzzles_sha256"]) == 64


def test_the_command_trains_evaluates_and_writes_the_held_out_lines(
    file: Path, tmp_path, capsys
) -> None:
    puzzles._kept.clear()  # solved files are kept in the process, and nothing would be shown
    small = [f"--set={key}={value}" for key, value in TINY.items()]
    held, out = tmp_path / "held.txt", tmp_path / "run"
    arguments = ["train", "sudoku", "--puzzles", str(file), "--reveal", "5", "--hold-out", "6",
                 "--write-held-out", str(held), "--grid-positions", "--lr-decay", "cosine",
                 "--steps", "60", "--batch-size", "4", "--out", str(out), *small]  # fmt: skip
    assert main([*arguments, "--json"]) == 0
    printed, said = capsys.readouterr()
    assert f"solved {COUNT} of {COUNT} puzzles" in said and "6 puzzles of the file" in said
    assert json.loads(printed)["count"] == 6
    assert len(held.read_text().splitlines()) == 6
    resume = ["train", "--resume", str(out), "--steps", "61"]
    assert main([*resume, "--reveal", "7"]) == 2
    assert "leave out --reveal" in capsys.readouterr().err
    assert main(resume) == 0
    for wrong, says in (
        (["--reveal", "5"], "--reveal: only with --puzzles"),
        (["--write-held-out", "x"], "--write-held-out: only with --puzzles"),
        (["--lr-decay", "cosine"], "--lr-decay: say with --steps"),
    ):
        assert main(["train", "sort", "--out", str(tmp_path / "no"), *wrong]) == 2
        assert says in capsys.readouterr().err


# ---- rates and positions -------------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_falls_along_half_a_cosine() -> None:
    run = preset("tiny-mlp", "sort", warmup=10, lr_decay="cosine", decay_steps=110)
    factor = [float(run.rate_factor(torch.tensor(float(done)))) for done in range(130)]
    assert factor[0] == pytest.approx(0.1) and factor[9] == factor[10] == 1
    assert factor[35] == pytest.approx(0.5 + 0.5 * 2**-0.5) and factor[60] == pytest.approx(0.5)
    assert factor[110] == pytest.approx(0, abs=1e-6) and max(factor[110:]) < 1e-6
    constant = preset("tiny-mlp", "sort", warmup=10)
    assert float(constant.rate_factor(torch.tensor(1000.0))) == 1
    with pytest.raises(InvalidArgument, match="decay_steps"):
        preset("tiny-mlp", "sort", warmup=10, lr_decay="cosine", decay_steps=10)
    with pytest.raises(InvalidArgument, match="lr_decay"):
        preset("tiny-mlp", "sort", lr_decay="linear")
    trainer = Trainer(preset("tiny-mlp", "sort", warmup=1, lr_decay="cosine", decay_steps=3,
                             batch_size=2, model=TINY))  # fmt: skip
    rates = []
    for _ in range(4):
        trainer.train_step()
        rates.append(float(trainer.optimizer.param_groups[0]["lr"]) / trainer.config.lr)
    assert rates == pytest.approx([1, 1, 0.5, 0], abs=1e-6)


@pytest.mark.parametrize("task", ["sudoku", "sudoku-6x6", "maze:size=9"])
def test_positions_of_cells_that_share_a_unit_are_alike(task: str) -> None:
    model = {"hidden_size": 256, "num_heads": 4, "L_layers": 1, "puzzle_emb_ndim": 256}
    net = TRM(preset("tiny-att", task, model=model, batch_size=2).model_config(tasks.get(task)))
    prefix = net.config.prefix_len
    table = net.inner.embed_pos.embedding_weight.detach()
    before = table.clone()
    starts.positions_of_units_(net, tasks.get(task).grid.units)
    assert prefix > 0 and torch.equal(table[:prefix], before[:prefix])
    assert float(table[prefix:].std() / before[prefix:].std()) == pytest.approx(1, abs=0.1)
    alike = torch.nn.functional.cosine_similarity(table[prefix:, None], table[None, prefix:], -1)
    size, units = int((len(table) - prefix) ** 0.5), 3 if task.startswith("sudoku") else 2
    shared = np.zeros((size * size, size * size))
    for cell in range(size * size):
        for other in range(size * size):
            (r, c), (s, d) = divmod(cell, size), divmod(other, size)
            shared[cell, other] = (r == s) + (c == d)
            if units == 3:
                rows, columns = Sudoku(size=size).layout.box_rows, Sudoku(size=size).layout.box_cols
                shared[cell, other] += (r // rows, c // columns) == (s // rows, d // columns)
    for count in range(units + 1):
        mean = float(alike[torch.from_numpy(shared == count)].mean()) if count in shared else None
        assert mean is None or mean == pytest.approx(count / units, abs=0.06)


@pytest.mark.parametrize("task, peers", [("sudoku-6x6", 12), ("maze:size=6", 4)])
def test_mixing_starts_at_the_neighbours(task: str, peers: int) -> None:
    """What changes at one cell reaches its neighbours, hardly others, and no puzzle embedding."""
    model = {"puzzle_emb_ndim": 64, "puzzle_emb_len": 2}
    net = TRM(preset("tiny-mlp", task, model=model, batch_size=2).model_config(tasks.get(task)))
    mlp = net.inner.L_level.layers[0].mlp_t
    before = [w.detach().clone() for w in (mlp.gate_up_proj.weight, mlp.down_proj.weight)]
    starts.mixing_of_neighbours_(net, tasks.get(task).grid.neighbours)
    prefix, inner = net.config.prefix_len, mlp.down_proj.weight.shape[1]
    gate_up, down = mlp.gate_up_proj.weight.detach(), mlp.down_proj.weight.detach()
    assert prefix > 0 and torch.equal(gate_up[:, :prefix], before[0][:, :prefix])
    assert torch.equal(down[:prefix], before[1][:prefix])
    for half in gate_up.split(inner):
        reached = (down @ half)[prefix:, prefix:].abs().numpy()
        near = tasks.get(task).grid.neighbours
        assert near.sum(axis=1).max() == peers and not near.diagonal().any()
        assert reached[near].mean() > 3 * reached[~near].mean()


def test_mixing_is_refused_where_there_is_no_grid_or_no_token_mlp() -> None:
    for name, task, model, match in (
        ("tiny-mlp", "sort", {}, "a task on a grid"),
        ("tiny-att", "maze:size=6", {}, "token MLPs"),
        ("tiny-mlp", "maze:size=6", {"expansion": 0.5}, "inner width"),
    ):
        with pytest.raises(InvalidArgument, match=match):
            Trainer(preset(name, task, grid_mixing=True, model=model))


def test_positions_are_refused_where_there_is_no_grid_or_nothing_learned() -> None:
    with pytest.raises(InvalidArgument, match="a task on a grid"):
        Trainer(preset("tiny-att", "sort", grid_positions=True))
    with pytest.raises(InvalidArgument, match="learned positions"):
        Trainer(preset("tiny-att", "sudoku-4x4", grid_positions=True,
                       model={"pos_encodings": "rope"}))  # fmt: skip
