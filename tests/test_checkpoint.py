"""Checkpoints: official names under any wrapper, rows of the table, refusals, atomic writing."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import recurx
from recurx import CheckpointError, InvalidArgument
from recurx.models import HRM, TRM, ACTLossHead, HRMConfig, TRMConfig
from recurx.models.act import RecursiveModel
from recurx.state_names import official_names

TABLE = "inner.puzzle_emb.weights"
SMALL = dict(puzzle_emb_ndim=64, puzzle_emb_len=2, num_puzzle_identifiers=9)
MODELS = {
    "trm": lambda: TRM(TRMConfig.tiny(11, 16, **SMALL)),
    "mlp": lambda: TRM(TRMConfig.tiny(11, 16, mlp_t=True, pos_encodings="none", **SMALL)),
    "single_z": lambda: TRM(TRMConfig.tiny(11, 16, variant="single_z", forward_dtype="bfloat16")),
    "hier6": lambda: TRM(TRMConfig.tiny(11, 16, variant="hier6", pos_encodings="learned")),
    "hrm": lambda: HRM(HRMConfig.tiny(11, 16, puzzle_emb_ndim=64)),
}
HINTS = dict(seq_len=16, num_heads=2, puzzle_emb_len=2)


def random_model(kind: str) -> RecursiveModel:
    """A model whose every tensor differs from a fresh one, the table's rows too."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_()
    return model


def outputs(model: RecursiveModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    batch = {
        "inputs": torch.randint(0, 11, (2, 16), generator=generator),
        "puzzle_identifiers": torch.zeros(2, dtype=torch.int32),
    }
    with torch.no_grad():
        return model(model.initial_carry(batch), batch)[1]


def same_answers(a: RecursiveModel, b: RecursiveModel) -> None:
    for name, want in outputs(a).items():
        assert torch.equal(outputs(b)[name], want), name


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("prefix", ["", "_orig_mod.model.", "module._orig_mod.model.", "model."])
def test_official_files_of_any_wrapper_build_the_model(
    kind: str, prefix: str, tmp_path: Path
) -> None:
    model = random_model(kind)
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "step_100")  # official files have no suffix
    save_file(state, tmp_path / "net.safetensors")
    hints = HINTS | ({"puzzle_emb_len": 0} if kind == "hrm" else {})
    cycles = dict(H_cycles=model.config.H_cycles, L_cycles=model.config.L_cycles)
    for file in ("step_100", "net.safetensors"):
        checkpoint = recurx.load_checkpoint(tmp_path / file, **hints, **cycles)
        assert dict(checkpoint).keys() == model.state_dict().keys()
        same_answers(model, checkpoint.build())
        fresh = MODELS[kind]()
        fresh.load_state_dict(checkpoint)
        same_answers(model, fresh.eval())


def test_wrappers_of_today_are_read_back(tmp_path: Path) -> None:
    model = random_model("trm")
    wrapped = torch.compile(ACTLossHead(nn.ModuleDict({"module": model})["module"]))
    torch.save(wrapped.state_dict(), tmp_path / "a.pt")
    inner_only = model.inner.state_dict()
    torch.save({"state_dict": inner_only, "step": 3}, tmp_path / "b.pt")
    for file in ("a.pt", "b.pt"):
        same_answers(model, recurx.load_checkpoint(tmp_path / file, **HINTS).build())


@pytest.mark.parametrize("kind", MODELS)
def test_our_own_file_needs_no_hints(kind: str, tmp_path: Path) -> None:
    model = random_model(kind)
    path = tmp_path / "m.safetensors"
    recurx.save_checkpoint(path, torch.compile(ACTLossHead(model)), extra={"step": 7, "loss": 0.5})
    checkpoint = recurx.load_checkpoint(path)
    assert checkpoint.config == model.config
    assert checkpoint.assumed == {}
    assert checkpoint.extra == {"step": 7, "loss": 0.5}
    same_answers(model, checkpoint.build())
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_only_the_asked_rows_are_read_in_their_order(tmp_path: Path) -> None:
    model = random_model("trm")
    table = model.state_dict()[TABLE]
    torch.save(model.state_dict(), tmp_path / "m.pt")
    recurx.save_checkpoint(tmp_path / "m.safetensors", model)
    for file in ("m.pt", "m.safetensors"):
        checkpoint = recurx.load_checkpoint(tmp_path / file, puzzle_rows=[7, 2], **HINTS)
        assert torch.equal(checkpoint[TABLE], table[[7, 2]])
        assert checkpoint.puzzle_rows.tolist() == [7, 2]
        built = checkpoint.build()
        assert built.config.num_puzzle_identifiers == 2
        assert torch.equal(built.puzzle_emb(torch.tensor([1])), table[[2]])
        with pytest.raises(CheckpointError, match=r"\[9, 64\].*no row 9"):
            recurx.load_checkpoint(tmp_path / file, puzzle_rows=[0, 9], **HINTS)
    with pytest.raises(InvalidArgument, match="puzzle_rows"):
        recurx.load_checkpoint(tmp_path / "m.pt", puzzle_rows=[])
    torch.save(random_model("single_z").state_dict(), tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match=r"no 'inner\.puzzle_emb\.weights'"):
        recurx.load_checkpoint(tmp_path / "none.pt", puzzle_rows=[0], **HINTS)


_PEAK = """
import sys, recurx, recurx.checkpoint
def peak():  # MB; not getrusage, which starts at the parent's peak
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
before = peak()
rows = [5, 99_000] if sys.argv[2] == "rows" else None
c = recurx.load_checkpoint(sys.argv[1], puzzle_rows=rows, seq_len=16, num_heads=2)
c.build()
if rows is None:
    c["inner.puzzle_emb.weights"].sum()
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("file", ["big.pt", "big.safetensors"])
def test_a_large_table_stays_on_disk(file: str, tmp_path: Path) -> None:
    model = TRM(TRMConfig.tiny(11, 16, puzzle_emb_ndim=256, num_puzzle_identifiers=100_000))
    if file == "big.pt":
        torch.save(model.state_dict(), tmp_path / file)
    else:
        recurx.save_checkpoint(tmp_path / file, model)
    size = (tmp_path / file).stat().st_size / 2**20
    assert size > 90

    def peak(which: str) -> float:
        command = [sys.executable, "-c", _PEAK, str(tmp_path / file), which]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert peak("rows") < 30, "MB: the asked rows and the net only"
    assert peak("all") > 0.9 * size, "the measure must see a table that is read"


def test_what_shapes_do_not_tell_is_said(tmp_path: Path) -> None:
    model = TRM(TRMConfig.sudoku_att(L_layers=1))
    torch.save(model.state_dict(), tmp_path / "step_1")
    checkpoint = recurx.load_checkpoint(tmp_path / "step_1")
    assert checkpoint.config == model.config
    expected = {"num_heads", "pos_encodings", "H_cycles", "L_cycles", "puzzle_emb_len", "seq_len"}
    assert set(checkpoint.assumed) == expected
    assert "assumed num_heads=8: head_dim 64" in str(checkpoint)
    told = recurx.load_checkpoint(tmp_path / "step_1", config={"L_cycles": 4, "num_heads": 4})
    assert (told.config.L_cycles, told.config.num_heads) == (4, 4)
    assert set(told.assumed) == expected - {"L_cycles", "num_heads"}


def test_the_configuration_beside_an_official_file_is_read(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    model = TRM(TRMConfig.sudoku_att(L_layers=1, L_cycles=3, num_heads=4))
    torch.save(model.state_dict(), tmp_path / "step_1")
    arch = (
        "{H_cycles: 3, L_cycles: 3, num_heads: 4, expansion: 4, puzzle_emb_len: 16, loss: {a: 1}}"
    )
    (tmp_path / "all_config.yaml").write_text(f"arch: {arch}\nlr: 0.1\n")
    checkpoint = recurx.load_checkpoint(tmp_path / "step_1")
    assert checkpoint.config == model.config
    assert set(checkpoint.assumed) == {"pos_encodings", "seq_len"}


def test_another_forward_dtype_is_a_choice(tmp_path: Path) -> None:
    model = random_model("single_z")
    recurx.save_checkpoint(tmp_path / "m.safetensors", model)
    for built in (
        recurx.load_checkpoint(tmp_path / "m.safetensors").build(forward_dtype="float32"),
        recurx.load_checkpoint(tmp_path / "m.safetensors", forward_dtype="float32").build(),
    ):
        assert built.inner.L_init.dtype == torch.float32
        assert outputs(built)["logits"].dtype == torch.float32


def test_models_built_twice_do_not_share_their_net(tmp_path: Path) -> None:
    recurx.save_checkpoint(tmp_path / "m.safetensors", random_model("trm"))
    checkpoint = recurx.load_checkpoint(tmp_path / "m.safetensors")
    first, second = checkpoint.build(), checkpoint.build()
    with torch.no_grad():
        first.inner.lm_head.weight.zero_()
    assert second.inner.lm_head.weight.any()


# ---- refusals: the key and the shape are named ---------------------------------------------


def broken(change: Any) -> dict[str, Tensor]:
    state = dict(random_model("trm").state_dict())
    change(state)
    return state


QKV = "inner.L_level.layers.0.self_attn.qkv_proj.weight"


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda s: s.pop("inner.q_head.bias"), r"missing 'inner.q_head.bias' \[2\]"),
        (lambda s: s.update(odd=torch.zeros(3)), r"unexpected 'odd' \[3\]"),
        (lambda s: s.update({QKV: torch.zeros(64, 64)}), rf"'{QKV}' is \[64, 64\], expected \[192"),
        (lambda s: s.pop("inner.embed_tokens.embedding_weight"), "no .*embed_tokens"),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_wrong_names_and_shapes_are_named(
    change: Any, message: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"m.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(broken(change), path)
    with pytest.raises(CheckpointError, match=message) as error:
        recurx.load_checkpoint(path, **HINTS)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_truncated_files_are_refused(suffix: str, keep: float, tmp_path: Path) -> None:
    path = tmp_path / f"m.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(broken(lambda s: None), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(CheckpointError, match="truncated"):
        recurx.load_checkpoint(path, **HINTS)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo run > /dev/null",)


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"inner.H_init": Bomb()}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="pickled code"):
        recurx.load_checkpoint(tmp_path / "m.pt")
    (tmp_path / "p.pt").write_bytes(pickle.dumps([Bomb()]))
    with pytest.raises(CheckpointError):
        recurx.load_checkpoint(tmp_path / "p.pt")
    with pytest.raises(CheckpointError, match="expected a tensor"):
        torch.save({"inner.H_init": 3}, tmp_path / "n.pt")
        recurx.load_checkpoint(tmp_path / "n.pt")
    with pytest.raises(FileNotFoundError):
        recurx.load_checkpoint(tmp_path / "absent.pt")


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_saved_files_have_the_permissions_of_any_new_file(umask: int, tmp_path: Path) -> None:
    """What safetensors writes, only its owner reads: nobody could load a shared checkpoint."""
    path = tmp_path / "m.safetensors"
    old = os.umask(umask)
    try:
        recurx.save_checkpoint(path, random_model("trm"))
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    path.chmod(0o640)
    recurx.save_checkpoint(path, random_model("trm"))
    assert path.stat().st_mode & 0o777 == 0o640  # a file that is replaced keeps its own


def test_an_interrupted_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    recurx.save_checkpoint(path, random_model("trm"))
    before = path.read_bytes()

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("recurx.checkpoint.os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recurx.save_checkpoint(path, random_model("mlp"))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_a_file_named_safetensors_that_is_none_is_refused_in_one_line(tmp_path) -> None:
    for head in (bytes(range(1, 200)), (10).to_bytes(8, "little") + b"[1, 2, 3] "):
        path = tmp_path / "net.safetensors"
        path.write_bytes(head)
        with pytest.raises(CheckpointError, match=r"net\.safetensors"):
            recurx.load_checkpoint(path)


# ---- files that are not what they seem, and arguments that contradict them -----------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"hidden_size": 32}, "hidden_size=64, and hidden_size=32"),
        ({"L_layers": 7}, "L_layers=2, and L_layers=7"),
        ({"variant": "single_z"}, "variant='trm', and variant='single_z'"),
        ({"vocab_size": 12}, "vocab_size=11, and vocab_size=12"),
        ({"mlp_t": True}, "mlp_t=False, and mlp_t=True"),
        ({"puzzle_emb_ndim": 0}, "puzzle_emb_ndim=64, and puzzle_emb_ndim=0"),
        ({"num_puzzle_identifiers": 3}, "num_puzzle_identifiers=9, and num_puzzle_identifiers=3"),
        ({"seq_len": "x"}, "`seq_len`: expected an int"),
        ({"H_cycles": 10**9}, "`H_cycles`: expected at most 4096"),
        ({"H_cycles": 4096, "L_cycles": 4096}, "`L_cycles`: expected H_cycles x"),
        ({"seq_len": 10**9}, "`seq_len`: expected at most 65536"),
        ({"expansion": 1e-9}, "`expansion`: expected inner widths within"),
        ({"expansion": float("inf")}, "`expansion`: expected a positive finite"),
        ({"expansion": 9000.0}, "has .* parameters, the file at most"),
    ],
)
def test_a_contradictory_or_impossible_argument_is_refused(fields: dict, says: str, tmp_path):
    for name, save in (("m.pt", torch.save), ("m.safetensors", save_file)):
        save(dict(random_model("trm").state_dict()), tmp_path / name)
        with pytest.raises((CheckpointError, InvalidArgument), match=says):
            recurx.load_checkpoint(tmp_path / name, **{**HINTS, **fields})


def test_what_agrees_may_be_said(tmp_path: Path) -> None:
    model = random_model("trm")
    torch.save(model.state_dict(), tmp_path / "m.pt")
    assert recurx.load_checkpoint(tmp_path / "m.pt", config=model.config).config == model.config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("arch:\n", "expected fields under `arch:`, got None"),
        ("arch: trm\n", "got 'trm'"),
        ("arch: [1, 2]\n", "got .1, 2."),
        ("", "got None"),
        ("arch: {H_cycles: x}\n", "`H_cycles`: expected an int, got 'x'"),
        ("arch: {H_cycles: 99999999}\n", "`H_cycles`: expected at most"),
        ("arch: {mlp_t: 3}\n", "True or False"),
        ("arch: {hidden_size: 512}\n", "hidden_size=64, and hidden_size=512"),
        ("arch: {a: [}\n", "unreadable: ParserError"),
        ("arch: {a: 2024-99-99}\n", "unreadable"),
        ("\x07", "unreadable: ReaderError"),
        ("[" * 5000, "unreadable"),
        ("a: b\n" * 200_000, "bytes are no configuration"),
    ],
)
def test_a_bad_configuration_beside_the_file_is_refused(text: str, says: str, tmp_path) -> None:
    pytest.importorskip("yaml")
    torch.save(random_model("trm").state_dict(), tmp_path / "step_1")
    (tmp_path / "all_config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=says):
        recurx.load_checkpoint(tmp_path / "step_1", **HINTS)


def test_the_encoding_of_comments_does_not_matter(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    torch.save(random_model("trm").state_dict(), tmp_path / "step_1")
    text = "# modèle\narch: {H_cycles: 2, num_heads: 2, puzzle_emb_len: 2}\npath: /données\n"
    (tmp_path / "all_config.yaml").write_bytes(text.encode("cp1252"))
    assert recurx.load_checkpoint(tmp_path / "step_1", seq_len=16).config.H_cycles == 2


def test_pointers_folders_and_expanded_tensors_are_named(tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match=r"git-lfs pointer.*run git lfs pull"):
        recurx.load_checkpoint(tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"a folder: expected one file of it; it has net\.pt"):
        recurx.load_checkpoint(tmp_path)
    state = {name: value.clone() for name, value in random_model("trm").state_dict().items()}
    state["inner.lm_head.weight"] = torch.zeros(1).expand(1 << 17, 1 << 17)  # 64 GB
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"68,7.* bytes, the file has .*repeat memory"):
        recurx.load_checkpoint(tmp_path / "net.pt", **HINTS)
    for value in (torch.zeros(2, 2).to_sparse(), torch.zeros(2, 2, device="meta")):
        torch.save({"inner.q": value}, tmp_path / "net.pt")
        with pytest.raises(CheckpointError, match=r"'inner.q' holds Tensor, expected a tensor"):
            recurx.load_checkpoint(tmp_path / "net.pt")


@pytest.mark.parametrize("key", ["recurx.config", "recurx.extra"])
@pytest.mark.parametrize("text", ["[1]", "3", "{", "", "[" * 9999, '{"vocab_size": {}}', "null"])
def test_damaged_metadata_is_named(key: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    model = random_model("trm")
    metadata = {"recurx.config": model.config.to_json(), "recurx.extra": "{}", key: text}
    save_file(dict(model.state_dict()), path, metadata)
    if key == "recurx.extra" and text.startswith('{"'):  # extra is the writer's
        assert recurx.load_checkpoint(path).extra == {"vocab_size": {}}
        return
    with pytest.raises(CheckpointError, match=f"m.safetensors: unreadable {key}"):
        recurx.load_checkpoint(path)


def test_tied_weights_are_written_twice(tmp_path: Path) -> None:
    model = random_model("single_z")
    model.inner.lm_head.weight = model.inner.embed_tokens.embedding_weight
    recurx.save_checkpoint(tmp_path / "m.safetensors", model)
    same_answers(recurx.load_checkpoint(tmp_path / "m.safetensors").build(), model)


# ---- wrappers and averages -------------------------------------------------------------------

PARTS = ["_orig_mod", "module", "model", "net", "_fsdp_wrapped_module", "_forward_module"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*PARTS, "ema_model"]), max_size=4), st.integers(0, 3))
def test_any_nesting_of_wrappers_is_taken_off(parts: list[str], at: int) -> None:
    names = [n.split(".") for n in ("inner.lm_head.weight", "inner.L_level.layers.0.mlp.w.weight")]
    stored = [
        ".".join([*name[: at % len(name)], *parts, *name[at % len(name) :]]) for name in names
    ]
    assert list(official_names("f", stored, None)) == [".".join(name) for name in names]


def _both(tmp_path: Path, how: str) -> tuple[Path, RecursiveModel, RecursiveModel]:
    trained, average = random_model("trm"), random_model("trm")
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(0.5)
    state, path = trained.state_dict(), tmp_path / "net.pt"
    shadow = {name: p.detach() for name, p in average.named_parameters()}  # of parameters alone
    if how == "flat":
        counters = {"initted": torch.tensor(True), "step": torch.tensor(4)}
        full = {f"ema_model.{name}": t for name, t in average.state_dict().items()}
        torch.save({f"online_model.{n}": t for n, t in state.items()} | full | counters, path)
    else:
        torch.save({"model": state, how: shadow, "epoch": 3}, path)
    return path, trained, average


@pytest.mark.parametrize("how", ["flat", "ema", "ema_state_dict"])
def test_of_weights_and_their_average_one_is_chosen(how: str, tmp_path: Path) -> None:
    path, trained, average = _both(tmp_path, how)
    with pytest.raises(recurx.CheckpointError, match="Pass ema=True for the average"):
        recurx.load_checkpoint(path, **HINTS)
    same_answers(trained, recurx.load_checkpoint(path, ema=False, **HINTS).build())
    same_answers(average, recurx.load_checkpoint(path, ema=True, **HINTS).build())


def test_what_is_asked_for_must_be_there(tmp_path: Path) -> None:
    model = random_model("trm")
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    averaged = torch.optim.swa_utils.AveragedModel(model)  # "module.", and n_averaged
    torch.save({f"ema.{n}": t for n, t in averaged.state_dict().items()}, tmp_path / "ema.pt")
    same_answers(model, recurx.load_checkpoint(tmp_path / "ema.pt", **HINTS).build())
    with pytest.raises(recurx.CheckpointError, match="ema=True was asked for, and it holds no av"):
        recurx.load_checkpoint(tmp_path / "plain.pt", ema=True, **HINTS)
    with pytest.raises(recurx.CheckpointError, match=r"ema=False .* holds only an average"):
        recurx.load_checkpoint(tmp_path / "ema.pt", ema=False, **HINTS)
