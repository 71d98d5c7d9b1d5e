"""What a command prints where, how it ends, and that its bar moves: for every subcommand."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import recurx
from recurx import commands, tasks
from recurx.backends import cpu
from recurx.checkpoint import save_checkpoint
from recurx.commands import COMMANDS, main
from recurx.experiments.answering import evaluate
from recurx.models import TRM, TRMConfig

ROOT = Path(recurx.__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("net") / "model.safetensors"
    torch.manual_seed(0)
    config = TRMConfig.tiny(6, 16, hidden_size=16, num_heads=2, halt_max_steps=4)
    save_checkpoint(path, TRM(config), {"task": "sudoku-4x4"})
    return str(path)


def test_json_is_all_that_stdout_has(monkeypatch, capsys) -> None:
    """Whoever prints, and whichever command: what is printed elsewhere goes to stderr."""
    from recurx.bench import env
    from recurx.cli import output

    def noisy(asked: env.Options) -> int:
        print("by print")
        output.make_console().print("by a console")
        output.json_line({"a": 1})
        return 7

    monkeypatch.setattr(env, "run", noisy)
    assert main(["env", "--json"]) == 7
    printed, said = capsys.readouterr()
    assert json.loads(printed) == {"a": 1} and said == "by print\nby a console\n"
    assert main(["env"]) == 7  # without --json nothing moves
    assert capsys.readouterr().out.split("\n")[:2] == ["by print", "by a console"]


def test_every_flag_named_json_is_that_one_or_a_file() -> None:
    """The redirection asks for `json is True`: a command with another flag would slip through."""
    from recurx.cli import options

    for name, (module, _) in COMMANDS.items():
        kind = getattr(__import__(module, fromlist=["x"]), "Options", None)
        fields = getattr(kind, "__dataclass_fields__", {})
        if "json" in fields:
            about = fields["json"]
            assert about.default is False or (about.default is None and name == "profile")
            assert options.stated(kind)["json"][0] is about.default


def test_eval_prints_json_for_jq(checkpoint: str, capsys) -> None:
    assert main(["eval", "--checkpoint", checkpoint, "--count", "4", "--json"]) == 0
    printed, said = capsys.readouterr()
    assert json.loads(printed)["count"] == 4 and printed.count("\n") == 1 and "exact" in said


@pytest.mark.parametrize("how", [{"halt": None}, {"halt": "q"}, {"rollouts": 2, "sigma": 0.1}])
def test_the_bar_moves_within_a_batch(checkpoint: str, how: dict) -> None:
    from recurx.train import evaluate as evaluated

    model = recurx.load_checkpoint(checkpoint).build()
    task = tasks.get("sudoku-4x4")
    examples = tasks.Sampler(task, 0, "held-out").draw(12)
    how = {"max_steps": 4, "rollouts": 1, "halt": None, **how}
    shown: list[int] = []
    with evaluate.advancing(model, 8, how, shown.append) as on_batch:
        evaluated(model, task, examples, batch_size=8, on_batch=on_batch, **how)
    assert shown == sorted(shown) and shown[-1] == 12 and max(shown) == 12
    assert not model._forward_pre_hooks
    if how["halt"] is None:
        assert [n for n in shown if n < 8 and n % 2 == 0][-4:] == [0, 2, 4, 6]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_ends_every_command_with_its_number(name: str, number, monkeypatch, capsys):
    def killed(arguments) -> int:
        raise KeyboardInterrupt(*([] if number == signal.SIGINT else [number]))

    real = commands.build_parser

    def parser(line):
        made = real(line)
        arguments = made.parse_args(line)
        arguments.execute = killed
        made.parse_args = lambda words: arguments
        return made

    monkeypatch.setattr(commands, "build_parser", parser)
    more = {"experiment": ["sort"], "export": ["net", "net.onnx"]}
    words = [name, *more.get(name, [])]
    assert main(words) == 128 + number
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "words", [["eval", "sudoku", "--count", "100000"], ["bench", "run", "--out", "r.json"]]
)
def test_signals_end_processes_with_their_number(words: list[str], number, tmp_path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "recurx", *words], cwd=tmp_path, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
             "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline()  # it runs
        process.send_signal(number)
        printed, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    died = {-number, 128 + number}  # a shell shows both as 128 + n
    assert process.returncode in died and "Traceback" not in printed, printed


def test_no_module_that_loses_signals_is_imported_once_a_command_runs() -> None:
    code = (
        "import sys\nfrom recurx import commands\n"
        "from recurx.experiments.answering import evaluate\n"
        "evaluate.run = lambda asked: print('numpy.random' in sys.modules)\n"
        "commands.main(['eval'])"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == "True\n", ran.stderr


def test_an_interrupt_while_a_command_is_imported(monkeypatch, capsys) -> None:
    def interrupted(line) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "build_parser", interrupted)
    assert main(["eval"]) == 130 and capsys.readouterr().err == "recurx eval: interrupted\n"


def test_only_a_lack_of_memory_is_called_one(monkeypatch, capsys) -> None:
    from recurx.bench import env

    for error, wanted in (
        (MemoryError(), 2), (RuntimeError("[enforce fail] not enough memory: you tried 9"), 2),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 3 GiB"), 2),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
    ):  # fmt: skip

        def fails(asked: object, error: Exception = error) -> int:
            raise error

        monkeypatch.setattr(env, "run", fails)
        if wanted is None:
            with pytest.raises(RuntimeError, match="illegal"):
                main(["env"])
        else:
            assert main(["env"]) == wanted
            assert "env: not enough memory: " in capsys.readouterr().err


def test_an_ascii_stdout_is_no_reason_to_fail(monkeypatch, tmp_path) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["bench", "report", "--no-plots"]) == 0
    assert b"recurx" in out.buffer.getvalue()
    monkeypatch.setattr(sys, "stderr", out)
    assert main(["eval", "--checkpoint", str(tmp_path / "modèle\udce9")]) == 2


def test_a_wrong_cpu_isa_is_said_once(monkeypatch) -> None:
    monkeypatch.setenv("RECURX_CPU_ISA", "foo")
    engine = cpu.Cpu()
    if engine._found[0] is None:
        pytest.skip("no compiled engine")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        reasons = {engine.why_unavailable() for _ in range(3)}
    assert len(reasons) == 1 and "got 'foo'" in reasons.pop()
    assert [str(w.message) for w in said if "cpu is out" in str(w.message)] == [
        str(w.message) for w in said
    ] and len(said) == 1
    problem = recurx.explain(TRM(TRMConfig.tiny(6, 16)).eval())
    assert "RECURX_CPU_ISA" in problem or "cpu" in problem


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["eval", "--threads", "100000"], "a whole number 1..64"),
        (["bench", "run", "--threads", "100000"], "a whole number 1..64"),
        (["profile", "--seconds", "nan"], "a time like"),
        (["eval", "--seed", "9" * 30], "expected a whole number"),
        (["eval", "--sigma", "nan"], "expected a number, got 'nan'"),
        (["eval", "--batch-size", "9" * 5000], "from 1 on"),
        (["train", "sort:length=" + "9" * 20], "at most 9 digits"),
        (["train", "sort:length=99999999"], "99,999,999 tokens: expected at most 65,536"),
        (["train", "sudoku-4x4", "--set", "expansion=0.0001"], "`expansion`: expected inner width"),
        (["train", "sudoku-4x4", "--set", "H_cycles=" + "9" * 9], "`H_cycles`: expected at most"),
        (["bench", "host", "--out", "/proc/nope/x.json"], "no folder /proc/nope"),
        (["profile", "--html", "/proc/nope/x.html"], "no folder /proc/nope"),
        (["profile", "--trace", "."], "is a folder"),
        (["bench", "run", "--import", "no.such.module"], "--import no.such.module: No module"),
    ],
)
def test_arguments_that_nothing_can_be_done_with(words, says: str, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    try:
        code = main(words)
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and says in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("said", ["abc", "2"])
def test_variables_of_torchrun_that_are_wrong(said: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", said)
    assert main(["train", "sudoku-4x4"]) == 2
    assert "WORLD_SIZE" in capsys.readouterr().err
