"""Damaged states: each of hundreds of mutations is refused by the project's own error."""

from __future__ import annotations

import dataclasses
import json
import random
import struct
from pathlib import Path

import pytest
import torch

from recurx.bench.counters import Memory
from recurx.errors import CheckpointError, RecurxError
from recurx.train import Trainer, run_folder, saved_config, state
from tests.train.test_train import differing, tiny

MUTATIONS = 400
MOST_MIB = 256  # more than before, all mutations together


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Trainer:
    made = Trainer(tiny(model={"puzzle_emb_ndim": 16}), tmp_path_factory.mktemp("run"))
    made.run(steps=5)
    return made


def path_of(run: Trainer) -> Path:
    return run.folder / run_folder.STATE_FILE


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One of seven kinds of damage, in the header as often as in the numbers."""
    data = bytearray(data)
    (header,) = struct.unpack("<Q", data[:8])
    end = rng.choice((8, 8 + header, len(data)))
    at = rng.randrange(end)
    kind = rng.randrange(7)
    if kind in (0, 1):  # a bit, the silent kind
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[at] = rng.randrange(256)
    elif kind == 3:
        data = data[:at]
    elif kind == 4:
        data[at : at + rng.randrange(1, 64)] = b""
    elif kind == 5:
        data[at:at] = rng.randbytes(rng.randrange(1, 64))
    else:
        length = rng.randrange(1, 512)
        data[at : at + length] = bytes(len(data[at : at + length]))
    return bytes(data)


def outcome(run: Trainer, data: bytes) -> str:
    """Write a state, resume; the error's text, or "" if all is as it was saved."""
    path_of(run).write_bytes(data)
    try:
        resumed = Trainer.resume(run.folder)
    except RecurxError as error:
        assert str(path_of(run)) in str(error), error
        return str(error)
    assert differing(resumed, run) == [] and resumed.config == run.config
    assert resumed.data.state_dict() == run.data.state_dict()
    return ""


def test_no_mutation_is_resumed_from_or_raises_anything_else(run: Trainer) -> None:
    whole, rng = path_of(run).read_bytes(), random.Random(7)
    memory = Memory("cpu")
    try:
        told = [outcome(run, changed) for _ in range(MUTATIONS)
                if (changed := mutated(whole, rng)) != whole]  # fmt: skip
    finally:
        path_of(run).write_bytes(whole)
    assert len(told) > 300 and all(told)  # none of these is without effect
    assert all("--start-from" in text for text in told)  # the averaged weights are whole
    assert memory.peak()["peak_mib"] < MOST_MIB
    assert outcome(run, whole) == ""


def test_without_the_checksum_damage_would_go_unseen(run: Trainer, monkeypatch) -> None:
    """Planted: what the mutations above find that nothing else does."""
    monkeypatch.setattr(state, "_checksum", lambda *_: None)
    monkeypatch.setattr(state, "CHECKSUM", "planted")
    whole = path_of(run).read_bytes()
    middle = bytearray(whole)
    middle[-100] ^= 4
    try:
        with pytest.raises(AssertionError):
            outcome(run, bytes(middle))
    finally:
        path_of(run).write_bytes(whole)


def test_every_bit_of_a_number_counts(run: Trainer) -> None:
    whole = path_of(run).read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    rng = random.Random(1)
    try:
        for _ in range(100):
            data = bytearray(whole)
            data[rng.randrange(8 + header, len(data))] ^= 1 << rng.randrange(8)
            path_of(run).write_bytes(data)
            with pytest.raises(CheckpointError, match="its checksum is not that of its contents"):
                state.read(path_of(run))
    finally:
        path_of(run).write_bytes(whole)


OTHERS = {  # whole files that say something else: those of other versions, or made on purpose
    "a field too many": lambda v, t: v.update(config=json.dumps({"task": "sort", "epochs": 3})),
    "no config": lambda v, t: v.pop("config"),
    "config of a list": lambda v, t: v.update(config="[1]"),
    "no JSON": lambda v, t: v.update(config="{"),
    "sampler of a list": lambda v, t: v.update(sampler=[1]),
    "no step": lambda v, t: v.pop("step"),
    "a step of words": lambda v, t: v.update(step="five"),
    "no carry": lambda v, t: t.pop("carry"),
    "a carry of less": lambda v, t: t["carry"].pop("steps"),
    "smaller weights": lambda v, t: t.update(average={k: w[:1] for k, w in t["average"].items()}),
    "no such weight": lambda v, t: t["model"].clear() or t["model"].update(x=torch.zeros(1)),
    "an optimiser of words": lambda v, t: t.update(optimizer={"0": {"first": torch.zeros(1)}}),
    "a tensor for a dict": lambda v, t: t.update(average=torch.zeros(2)),
    "a queue of odd rows": lambda v, t: t["queue"].update(inputs=torch.zeros(1, 99)),
    "values of a list": None,
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_whole_state_of_another_kind_is_refused_too(run: Trainer, name: str) -> None:
    whole = path_of(run).read_bytes()
    values, tensors = state.read(path_of(run))
    if OTHERS[name] is None:
        values = [1]
    else:
        OTHERS[name](values, tensors)
    try:
        state.write(path_of(run), values, tensors)
        assert outcome(run, path_of(run).read_bytes()) != ""
    finally:
        path_of(run).write_bytes(whole)


def crafted(header: str, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header.encode()


GIANT = json.dumps({"a": {"dtype": "F32", "shape": [2**44], "data_offsets": [0, 2**46]}})
HOSTILE = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "a header of 2^63 bytes": crafted("{}", 2**63),
    "a header of 90 MB that is not there": crafted("{}", 90 * 10**6),
    "a tensor of 64 TB": crafted(GIANT),
    "a tensor of 64 TB without room": crafted(GIANT.replace(f"{2**46}", "0")),
    "2^62 times 2^62 numbers": crafted(GIANT.replace(f"[{2**44}]", f"[{2**62},{2**62}]")),
    "deep JSON": crafted("[" * 100_000),
    "no text": crafted("{}")[:8] + b"\xff\xfe",
    "metadata of numbers": crafted('{"__metadata__":{"values":3}}'),
    "no tensors": crafted('{"__metadata__":{"values":"{}"}}'),
    "a pickle": b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_little_memory(run: Trainer, name: str) -> None:
    whole = path_of(run).read_bytes()
    memory = Memory("cpu")
    try:
        assert outcome(run, HOSTILE[name]) != ""
    finally:
        path_of(run).write_bytes(whole)
    assert memory.peak()["peak_mib"] < MOST_MIB


def test_without_good_weights_beside_it_nothing_is_offered(run: Trainer) -> None:
    whole, model = path_of(run).read_bytes(), run.folder / run_folder.MODEL_FILE
    weights = model.read_bytes()
    try:
        model.write_bytes(weights[:200])
        assert "--start-from" not in outcome(run, whole[:-9])
    finally:
        path_of(run).write_bytes(whole)
        model.write_bytes(weights)


def test_damaged_metrics_do_not_stop_a_run(run: Trainer) -> None:
    good = json.dumps({"step": 2, "loss": 1.0})
    odd = ["[1]", "3", '{"step": null}', "[" * 5000, "\udc80", '{"step": 1e400}']
    text = "\n".join([good, *odd, good]).encode("utf-8", "surrogateescape")
    (run.folder / run_folder.METRICS_FILE).write_bytes(text)
    Trainer.resume(run.folder)
    kept = (run.folder / run_folder.METRICS_FILE).read_text().splitlines()
    assert kept == [good, good]


def test_the_config_of_a_damaged_state_is_an_error_too(run: Trainer) -> None:
    assert dataclasses.asdict(saved_config(run.folder)) == dataclasses.asdict(run.config)
    whole = path_of(run).read_bytes()
    try:
        path_of(run).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match="damaged"):
            saved_config(run.folder)
    finally:
        path_of(run).write_bytes(whole)
