"""bench/gpu_check over a double of a GPU: every phase starts, writes, and survives a kill.

The double is `gpu_double.py`, a module that each phase imports first. What a phase writes here is
marked as synthetic and lies in a temporary folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu_check import journal, phases
from bench.gpu_check.phases import ALONE, BESIDE, ROOT, Phase
from bench.gpu_check.runner import GRACE, Runner

DOUBLE = ("--import", "gpu_double")


def check(folder: Path, *arguments: str, **environ: str) -> list[str]:
    return [sys.executable, "-m", "bench.gpu_check", str(folder), *arguments]


def run(folder: Path, *arguments: str, limit: float = 600, **environ: str) -> str:
    done = subprocess.run(
        check(folder, *arguments), cwd=ROOT, env={**os.environ, **environ}, timeout=limit,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    return done.stdout + done.stderr


def result_of(folder: Path) -> dict:
    (path,) = folder.glob("gpu-*.json")
    return json.loads(path.read_text())


# ---- the plan ------------------------------------------------------------------------------------


def test_names_choose_phases_and_an_unknown_one_is_refused_with_the_known_ones():
    names = [phase.name for phase in phases.chosen((), ())]
    assert names[0] == "versions" and len(set(names)) == len(names)
    some = [phase.name for phase in phases.chosen(["proof", "times"], ["proof owner"])]
    assert some[0] == "versions" and "proof grid" in some and "times" in some
    assert "proof owner" not in some and "wrappers" not in some
    with pytest.raises(ValueError, match=r"expected one of versions, .*, got 'prof'"):
        phases.chosen(["prof"], ())


def test_every_file_of_tests_that_needs_a_gpu_is_in_a_phase():
    there = {path.stem for path in Path(__file__).parent.glob("test_*_on_gpu.py")}
    assert there == {*phases.TESTS, "test_wrappers_on_gpu"}
    elsewhere = [
        path for path in (ROOT / "tests").rglob("test_*.py")
        if "mark.gpu" in path.read_text() and path.parent != Path(__file__).parent
    ]  # fmt: skip
    assert elsewhere == []


def test_the_settings_are_known_to_pytest_8():
    text = (ROOT / "bench" / "gpu_check" / "pytest.ini").read_text()
    keys = {line.split("=")[0].strip() for line in text.splitlines() if "=" in line}
    assert keys == {"markers"}
    assert all("-c" in p.command for p in phases.phases() if "pytest" in p.command)


# ---- the runner, over processes that need no torch -----------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a call writes; modules of phases lie beside it."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))
    made = tmp_path / "out"
    made.mkdir()
    return made


def phase(folder: Path, name: str, code: str, limit: float = 30, **fields) -> Phase:
    module = name.replace(" ", "_")
    (folder.parent / f"{module}.py").write_text(code)
    fields.setdefault("needs", ())
    return Phase(name, (*phases.child(), module), limit, **fields)


def runner(folder: Path, seconds: float = 60.0, planned: tuple[str, ...] = ()) -> Runner:
    journal.append(
        folder / "gpu_check.jsonl", {"phase": "", "kind": "call", "planned": list(planned)}
    )
    return Runner(folder, folder / "gpu-x.json", os.environ, time.monotonic() + seconds)


EMIT = "from bench.gpu_check.journal import emit\nemit('seen', what={})\n"


def by_name(folder: Path) -> dict[str, dict]:
    return {entry["name"]: entry for entry in result_of(folder)["phases"]}


def test_phases_go_on_after_a_failure_a_crash_and_a_program_that_is_missing(folder):
    one = runner(folder)
    one.run([
        phase(folder, "fails", EMIT.format(1) + "print('so it goes')\nraise SystemExit(3)"),
        phase(folder, "absent", "raise SystemExit(77)"),
        phase(folder, "crashes", EMIT.format(2) + "import os\nos.kill(os.getpid(), 11)"),
        Phase("missing", ("no-such-program-anywhere",), 20, ()),
        phase(folder, "passes", EMIT.format(3)),
    ])  # fmt: skip
    found = by_name(folder)
    assert {n: e["status"] for n, e in found.items()} == {
        "fails": "failed", "absent": "absent", "crashes": "failed", "missing": "missing",
        "passes": "passed",
    }  # fmt: skip
    assert "so it goes" in found["fails"]["tail"]
    assert found["crashes"]["lines"] == [{"kind": "seen", "what": 2}]
    assert "ended by signal 11" in found["crashes"]["tail"]
    assert any("Segmentation fault" in line for line in found["crashes"]["tail"])
    assert found["passes"]["lines"] == [{"kind": "seen", "what": 3}]
    assert {p.name for p in folder.iterdir()} == {"gpu-x.json", "gpu_check.log", "gpu_check.jsonl"}


HANG = """
import time
def waits_for_the_device():
    while True:
        try: time.sleep(60)
        except KeyboardInterrupt: pass
waits_for_the_device()
"""


def test_a_hang_is_interrupted_then_killed_and_leaves_its_traceback(folder):
    begin = time.monotonic()
    one = runner(folder)
    one.run(
        [phase(folder, "hangs", EMIT.format(1) + HANG, 4), phase(folder, "passes", EMIT.format(2))]
    )
    found = by_name(folder)
    assert found["hangs"]["status"] == "timeout" and found["passes"]["status"] == "passed"
    assert found["hangs"]["lines"] == [{"kind": "seen", "what": 1}]
    assert any("in waits_for_the_device" in line for line in found["hangs"]["tail"])
    assert 4 + GRACE <= found["hangs"]["seconds"] < time.monotonic() - begin < 40


def test_what_is_timed_runs_alone_and_compilers_run_beside(folder):
    """Spans of the phases, from their own lines."""
    now = EMIT.format("time.monotonic()")
    both = f"import time\n{now}time.sleep(0.4)\n{now}"
    one = runner(folder)
    one.run([
        phase(folder, "build", both, lane=BESIDE), phase(folder, "quiet", both, quiet=True),
        phase(folder, "beside the build", both),
        phase(folder, "after", both, needs=("build", "not planned")),
        phase(folder, "one", both, lane="x"), phase(folder, "two", both, lane="x"),
    ])  # fmt: skip
    spans = {
        name: (entry["lines"][0]["what"], entry["lines"][1]["what"])
        for name, entry in by_name(folder).items()
    }

    def apart(a: str, b: str) -> bool:
        return spans[a][1] < spans[b][0] or spans[b][1] < spans[a][0]

    assert all(apart("quiet", other) for other in spans if other != "quiet")
    assert apart("beside the build", "after") and spans["build"][1] < spans["after"][0]
    assert apart("after", "one") and apart("after", "two")
    assert one.ended.keys() == spans.keys() and ALONE != BESIDE


def test_with_no_time_left_the_rest_is_not_started_and_the_file_says_so(folder):
    one = runner(folder, seconds=12, planned=("hangs", "late"))
    one.run([phase(folder, "hangs", HANG, 60), phase(folder, "late", EMIT.format(1))])
    found = by_name(folder)
    assert found["hangs"]["status"] == "timeout" and found["late"]["status"] == "not started"
    assert result_of(folder)["status"] == "partial"


def test_a_torn_line_costs_itself_alone(tmp_path):
    path = tmp_path / "lines"
    journal.append(path, {"kind": "a", "phase": "one"})
    with path.open("a") as file:
        file.write('{"kind": "torn", "phase"')
    journal.append(path, {"kind": "b", "phase": "one"})
    assert [line["kind"] for line in journal.read(path)] == ["a", "b"]


# ---- the whole check over the double -------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_exits_cleanly(tmp_path):
    said = run(tmp_path / "out")
    assert "sees no NVIDIA GPU" in said
    written = result_of(tmp_path / "out")
    assert written["status"] == "partial" and written["groups"] == []
    assert {p["status"] for p in written["phases"]} == {"no gpu", "not started"}
