"""Damaged and hostile files of every kind: read, or refused by recurx's own errors, within bounds.

CI runs some of each kind; `RECURX_MUTATIONS=5000 pytest -s tests/test_mutated_files.py` runs so
many in all, and prints the slowest and the memory.
"""

from __future__ import annotations

import io
import json
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import recurx
from recurx import RecurxError
from recurx.bench import results
from recurx.bench.counters import Memory
from recurx.experiments.tasks import Maze
from recurx.experiments.tasks.arc import files as arc_files
from recurx.experiments.tasks.maze import files as maze_files
from recurx.experiments.tasks.sudoku import files
from recurx.experiments.tasks.sudoku.layout import Layout
from recurx.models import TRM, TRMConfig

COUNT = int(os.environ.get("RECURX_MUTATIONS", "560"))
SECONDS = 10.0  # of the processor: a hang, not a slow machine
MOST_MIB = 1024

PUZZLE = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
ANSWER = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
ARC = {"aa": {"train": [{"input": [[1, 2], [3, 4]], "output": [[2]]}], "test": [{"input": [[3]]}]}}
SQUARE, WAY = "S  #   #  G#####", "Soo#  o#  G#####"
RESULT = {
    "schema": 2, "status": "complete",
    "provenance": dict.fromkeys(
        ("date", "command", "commit", "dirty", "device", "cpu", "threads", "torch"), "x"),
    "groups": [{"case": "a", "mode": "step", "batch": 1, "rows": [
        {"variant": "v", "status": "timed", "dtype": "f", "p20_ms": 1, "p50_ms": 1, "p80_ms": 1,
         "rounds": 1, "times_ms": [1]}]}],
}  # fmt: skip
# What takes the place of numbers and names: what parsers and allocators trip over.
NASTY = [
    "-1", "0", "1e999", "9" * 30, "9" * 5000, "NaN", "null", "true", "[]", "{}", '""', '"x"',
    "[[[[]]]]", "4096", "2147483647", "0.0001", "-0.0", "\x00", "\ud7ff", "{a: [", "&a [*a]",
    "!!python/x", "2024-99-99", "1_000", "0x7fffffff", "~", "%", "\\u0000", "68719476736",
    "|||", '"', "''", "#",
]  # fmt: skip


def torch_file(state: dict) -> bytes:
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def tiny() -> TRM:
    torch.manual_seed(0)
    return TRM(TRMConfig.tiny(11, 16, hidden_size=16, num_heads=2, puzzle_emb_ndim=16, L_layers=1,
                              puzzle_emb_len=1, num_puzzle_identifiers=4))  # fmt: skip


# ---- mutations ---------------------------------------------------------------------------------


def of_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Flipped, cut, doubled, zeroed, overwritten or inserted bytes, at one or a few places."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        at, kind = int(rng.integers(len(out) + 1)), rng.integers(7)
        length = int(rng.integers(1, 1 + min(64, len(out) or 1)))
        if kind == 0 and out:
            out[at % len(out)] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            del out[at : at + length]
        elif kind == 3:
            out[at:at] = out[at : at + length] * int(rng.integers(1, 40))
        elif kind == 4:
            out[at : at + length] = bytes(length)
        elif kind == 5:
            out[at : at + length] = rng.bytes(length)
        else:
            out[at:at] = rng.choice(NASTY).encode("utf-8", "surrogatepass")
    return bytes(out)


def of_text(data: bytes, rng: np.random.Generator) -> bytes:
    """Words and numbers replaced by nasty ones, lines swapped, doubled and dropped."""
    import re

    text = data.decode("latin1")
    for _ in range(int(rng.integers(1, 5))):
        words = [m.span() for m in re.finditer(r"[\w.]+|[^\w\s]", text)] or [(0, 0)]
        a, b = words[int(rng.integers(len(words)))]
        text = text[:a] + str(rng.choice(NASTY)) + text[b:]
    lines = text.splitlines(keepends=True)
    if rng.integers(4) == 0 and lines:
        lines[int(rng.integers(len(lines)))] = lines[int(rng.integers(len(lines)))] * 3
    out = "".join(lines).encode("utf-8", "surrogatepass")
    return of_bytes(out, rng) if rng.integers(4) == 0 else out


def of_safetensors(data: bytes, rng: np.random.Generator) -> bytes:
    """The JSON header with other values, its length right again."""
    size = int.from_bytes(data[:8], "little")
    if rng.integers(3) == 0:
        return of_bytes(data, rng)
    header = of_text(data[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def of_zip(data: bytes, rng: np.random.Generator) -> bytes:
    """A member of the archive changed and packed anew, its checksum right again."""
    if rng.integers(3) == 0:
        return of_bytes(data, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl") or rng.integers(20) == 0:
                content = of_bytes(content, rng)
            if rng.integers(40):
                new.writestr(name, content)
    return out.getvalue()


# ---- kinds: (file name, valid bytes, mutation, reader) ------------------------------------------


def load(path: Path) -> None:
    net = recurx.load_checkpoint(path, **({} if path.suffix else {"num_heads": 2, "seq_len": 16}))
    model = net.build()
    assert str(net) and net.recommended is not None and model.inner is not None


def kinds(folder: Path) -> dict[str, tuple[str, bytes, Callable, Callable]]:
    model = tiny()
    own = folder / "own.safetensors"
    recurx.save_checkpoint(own, model, {"task": "sudoku-4x4", "solve": {"sigma": 0.1}})
    plain = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(plain, folder / "plain")
    (folder / "step_1").write_bytes(torch_file(plain))
    (folder / "aa.json").write_text(json.dumps(ARC))
    csv = f"id,Puzzle,solution,rating\n1,{PUZZLE},{ANSWER},3\n2,{PUZZLE},,4\n"
    grid = "\n".join(PUZZLE[i : i + 9] for i in range(0, 81, 9)) + f"\n\n{PUZZLE}\n# end\n"
    maze = f'source;question;answer\na;{SQUARE};{WAY}\nb;"{SQUARE}";\n'
    arch = "# one\narch:\n  name: recursive_reasoning.trm@TRM\n  H_cycles: 2\n  L_cycles: 3\n"
    arch += "  num_heads: 2\n  expansion: 4\n  inner_multiple: 32\n  puzzle_emb_len: 1\n"
    arch += "  loss: {name: x}\nlr: 0.1\n"
    layout, maze_task = Layout.of(9), Maze(size=4)

    def sudoku(path: Path) -> None:
        assert len(files.read(path, layout)) and files.first_puzzle(path)

    def named(path: Path) -> None:
        arc_files.task(folder / "aa.json", names=path)

    def arc(path: Path) -> None:
        for examples, _ in arc_files.task(path).test_batches(4, votes=2):
            assert examples.inputs.max() < 12

    names = json.dumps(["<blank>", "aa", "aa|||t3|||0123456789", "b"]).encode()
    return {
        "torch": ("net.pt", torch_file(plain), of_zip, load),
        "official": ("net", torch_file({"model": plain}), of_zip, load),
        "safetensors": ("net.safetensors", own.read_bytes(), of_safetensors, load),
        "plain": ("plain_net", (folder / "plain").read_bytes(), of_safetensors, load),
        "yaml": ("all_config.yaml", arch.encode(), of_text, lambda path: load(folder / "step_1")),
        "csv": ("sudoku.csv", csv.encode(), of_text, sudoku),
        "lines": ("sudoku.txt", grid.encode(), of_bytes, sudoku),
        "maze": ("maze.csv", maze.encode(), of_text, lambda p: maze_files.read(p, maze_task)),
        "arc": ("arc.json", json.dumps(ARC).encode(), of_text, arc),
        "names": ("identifiers.json", names, of_text, named),
        "results": ("result.json", json.dumps(RESULT).encode(), of_text, results.load),
    }


KINDS = (
    "torch", "official", "safetensors", "plain", "yaml", "csv", "lines", "maze", "arc", "names",
    "results",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_end_in_our_own_errors(kind: str, tmp_path: Path) -> None:
    known = kinds(tmp_path)
    assert tuple(known) == KINDS
    name, valid, mutate, read = known[kind]
    path = tmp_path / name
    path.write_bytes(valid)
    read(path)  # the file itself is fine
    rng = np.random.default_rng(KINDS.index(kind))
    memory = Memory("cpu")
    read_well, slowest, raw = 0, 0.0, []
    count = -(-COUNT // len(KINDS))
    for number in range(count):
        content = mutate(valid, rng)
        path.write_bytes(content)
        start = time.process_time()
        try:
            read(path)
            read_well += 1
        except RecurxError as error:
            if name.split(".")[0] not in str(error) and "step_1" not in str(error):
                raw.append((number, f"no path: {error}"))
        except Exception as error:
            raw.append((number, f"{type(error).__name__}: {error}"))
        slowest = max(slowest, time.process_time() - start)
    grown = memory.peak()["peak_mib"]
    print(f"{kind}: {count}, {read_well} read, slowest {slowest:.2f} s, {grown} MiB")
    assert not raw, raw[:5]
    assert slowest < SECONDS and grown < MOST_MIB
    assert read_well < count  # the mutations do something


def test_a_reader_that_lets_one_error_through_is_found(tmp_path, monkeypatch) -> None:
    """Planted: without the one reader, the same mutations end in errors of other packages."""
    import contextlib

    @contextlib.contextmanager
    def nothing(*_: Any):
        yield

    for module in ("recurx.weights_file", "recurx.checkpoint"):
        monkeypatch.setattr(f"{module}.reading", nothing)
    raised = 0
    for kind in ("torch", "safetensors", "yaml"):
        name, valid, mutate, read = kinds(tmp_path)[kind]
        rng = np.random.default_rng(1)
        for _ in range(20):
            (tmp_path / name).write_bytes(mutate(valid, rng))
            try:
                read(tmp_path / name)
            except RecurxError:
                pass
            except Exception:
                raised += 1
    assert raised > 10
