"""Result files, and the tables and plots made from them."""

from __future__ import annotations

import copy
import sys

import documents
import pytest
from documents import document, row, untimed, write

from recurx import atomic
from recurx.atomic import write_json
from recurx.bench import plots, predict, ratios, report, results
from recurx.bench.provenance import ROOT
from recurx.commands import main
from recurx.errors import InvalidArgument, RecurxError

ROWS = [
    row("recurx-cpu/bf16", [10, 11, 12], tflops=0.1, of_peak=0.5, launches=1, peak_mib=9.5),
    row("eager/bf16", [100, 110, 120]),
    row("recurx-cpu/fp32", [20, 22, 24]),
    row("eager/fp32", [10, 11, 12]),  # recurx loses
    untimed("compile/fp32", "failed", "no C++ compiler"),
    untimed("recurx-triton/fp32", "wrong", "one call: drift 1, allowed 0.01"),
]


@pytest.fixture
def result(tmp_path):
    return write(tmp_path / "result.json", document(ROWS))


# ---- tables --------------------------------------------------------------------------------------


def test_the_table_shows_every_row_lost_ones_included(result):
    text = report.markdown([result])
    (line,) = [line for line in text.splitlines() if line.startswith("| trm-att | 1 |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    (heads,) = [line for line in text.splitlines() if line.startswith("| case | B |")]
    heads = [cell.strip() for cell in heads.strip("|").split("|")]
    got = dict(zip(heads, cells, strict=True))
    assert got["recurx-cpu bf16"] == "**11**" and got["eager bf16"] == "110 (10x)"
    assert got["recurx-cpu fp32"] == "22" and got["eager fp32"] == "**11** (0.50x)"
    assert got["compile fp32"] == "failed" and got["recurx-triton fp32"] == "wrong"
    assert "one call: drift 1, allowed 0.01" in text and "no C++ compiler" in text
    assert "Some CPU" in text and "2026-01-02" in text and "0123456" in text
    assert "`python -m recurx bench run`" in text
    assert "| trm-att step, cpu bf16 | 1 | 10-12 | 100 | 50% | – | – | 1 | 9.5 |" in text


def test_the_engine_that_ran_is_said_and_judged_by_its_own_model(tmp_path):
    """Flags do not tell whether fp32 ran by AMX; files of before say flags alone."""
    cpu = dict(documents.CPU, flags=["avx2", "avx512f", "amx_bf16"])
    said = document(ROWS, cpu=dict(cpu, engine="amx_split"))
    assert "amx_bf16; engine amx_split" in report.markdown([write(tmp_path / "a.json", said)])
    rates = dict(copy_gbs=9.0, large_fp32_tflops=0.2, large_bf16_tflops=0.4, case_bf16_tflops=0.1)
    for made, isa in ((said, "amx_split"), (document(ROWS, cpu=cpu), "amx")):
        made["groups"][0]["ceilings"] = rates
        assert predict.device_of(made).isa == isa


def test_solving_shows_accuracy_beside_speed(tmp_path):
    ours = row("recurx-cpu/fp32", [100.0], puzzles_per_s=2560.0, exact=0.95, steps_mean=3.0)
    fixed = row("eager/fp32", [1600.0], puzzles_per_s=160.0, exact=0.97, steps_mean=16.0)
    made = document([ours, fixed], case="sudoku-6x6", mode="solve", batch=256)
    text = report.markdown([write(tmp_path / "solve.json", made)])
    assert "| **2,560**, 95% exact in 3.0 steps | 160 (16x), 97% exact in 16.0 steps |" in text


def test_the_newest_row_of_a_key_is_shown(tmp_path, result):
    later = document([row("recurx-cpu/bf16", [5, 5, 5])], date="2026-02-01T00:00:00+00:00")
    text = report.markdown([result, write(tmp_path / "later.json", later)])
    assert "| trm-att | 1 | **5** |" in text and "2026-02-01" in text


def test_markers(tmp_path, result, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("# head\n<!-- bench:begin (generated) -->\nold\n<!-- bench:end -->\ntail\n")
    for _ in range(2):  # writing twice changes nothing
        command = ["bench", "report", str(result.path), "--write", str(readme), "--no-plots"]
        assert main(command) == 0
        text = readme.read_text()
        assert text.startswith("# head\n<!-- bench:begin (generated) -->\n**Some CPU")
        assert text.endswith("<!-- bench:end -->\ntail\n") and "old" not in text
    link = tmp_path / "link.md"
    link.symlink_to(readme)
    readme.write_text(text.replace("Some CPU", "old"))
    assert main([*command[:4], str(link), "--no-plots"]) == 0
    assert link.is_symlink() and readme.read_text() == text
    readme.write_text("# no markers\n")
    assert main(command) == 2 and readme.read_text() == "# no markers\n"
    assert "bench:begin" in capsys.readouterr().err


def test_ratios_compare_with_the_fastest_pytorch_a_user_could_take(result, tmp_path):
    """fp32 with fp32; bf16 with the faster of both: here PyTorch's fp32 beats its own bf16."""
    text = ratios.ratios([result])
    assert "| machine | case | step, fp32 | step, bf16 |" in text
    assert "trm-att | **0.50x** eager (B=1) | **1.00x** eager fp32 (B=1) |" in text
    rows = [row("recurx-cpu/fp32", [1.0]), row("tuned/fp32", [3.0]), row("eager/fp32", [4.0])]
    made = document(rows)
    made["groups"] += document(rows[::2], batch=8)["groups"]
    assert ratios.cpu_table([write(tmp_path / "fast.json", made)]).splitlines()[2:] == [
        "| Some CPU (1/2), 2 threads | trm-att | **3.0x** tuned (B=1), **4.0x** eager (B=8) |"
    ]
    alone = document([row("recurx-cpu/fp32", [1.0])])
    assert "trm-att" not in ratios.cpu_table([write(tmp_path / "alone.json", alone)])


def test_a_page_holds_all_tables_or_those_of_ratios(tmp_path, result):
    readme, page = tmp_path / "README.md", tmp_path / "benchmarks.md"
    readme.write_text("# head\n<!-- ratios:begin (made) -->\nold\n<!-- ratios:end -->\n")
    page.write_text("<!-- bench:begin -->\nold\n<!-- bench:end -->\n")
    command = ["bench", "report", str(result.path), "--no-plots"]
    assert main([*command, "--write", str(readme), str(page)]) == 0
    table = ratios.ratios([result])
    assert (
        readme.read_text()
        == f"# head\n<!-- ratios:begin (made) -->\n{table}\n<!-- ratios:end -->\n"
    )
    assert report.markdown([result]) in page.read_text() and table not in page.read_text()


def test_without_results_it_says_what_to_do():
    for tables in (report.markdown, ratios.ratios):
        with pytest.raises(InvalidArgument, match="python -m recurx bench run"):
            tables([])


@pytest.mark.parametrize(
    "value, text", [(1543.3, "1,543"), (171.0, "171"), (17.12, "17.1"), (0.0123, "0.0123"),
                    (0.000012, "0.000012"), (0, "0")]
)  # fmt: skip
def test_figures_have_three_digits_and_no_exponent(value, text):
    assert report.figure(value) == text


# ---- plots ---------------------------------------------------------------------------------------


def test_plots_are_readable_on_both_pages(tmp_path, result):
    pytest.importorskip("matplotlib")
    from matplotlib import image

    written = plots.draw([result], tmp_path / "plots")
    assert [path.suffix for path in written] == [".png", ".svg"]
    for page in plots.PAGES.values():
        assert plots.contrast(plots.INK, page) > 4
        assert min(plots.contrast(c, page) for c in (plots.FASTER, plots.SLOWER)) > 3
    pixels = image.imread(written[0])
    corner = pixels[0, 0]
    assert corner[3] == 0, "the page shows through"
    opaque = pixels.reshape(-1, 4)[::3]
    opaque = (255 * opaque[opaque[:, 3] == 1][:, :3]).round().astype(int)
    colours = {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in opaque}
    assert {plots.INK, plots.FASTER, plots.SLOWER} <= colours
    svg = written[1].read_text()
    assert "eager fp32" in svg and "recurx is slower" in svg
    again = plots.draw([result], tmp_path / "again")
    assert again[1].read_bytes() == written[1].read_bytes(), "no date, no random names"


def test_contrast_is_that_of_the_standard():
    assert plots.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert plots.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_without_matplotlib_it_says_what_to_install(tmp_path, result, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RecurxError, match=r"recurx\[plot\]"):
        plots.draw([result], tmp_path)


# ---- files ---------------------------------------------------------------------------------------


def test_the_files_of_the_repository_can_be_read():
    folder = ROOT / "bench" / "results"
    found = results.load_folder(folder)
    assert len(found) == len(
        [p for p in folder.glob("*.json") if not p.stem.startswith(("install", "host"))]
    )
    text = report.markdown(found)
    assert "| trm-att | 1 |" in text


@pytest.mark.parametrize(
    "damage, problem",
    [
        (lambda d: d.update(schema=1), "expected schema 2, got 1"),
        (lambda d: d.update(status="done"), "status"),
        (lambda d: d["provenance"].pop("commit"), "provenance.commit is missing"),
        (lambda d: d["groups"][0].pop("batch"), "batch is missing"),
        (lambda d: d["groups"][0]["rows"][0].pop("p80_ms"), "p80_ms is missing"),
        (lambda d: d["groups"][0]["rows"][0].update(status="fine"), "status: expected one of"),
        (lambda d: d["groups"][0]["rows"][5].update(p50_ms=1.0), "has a time"),
        (lambda d: d["groups"][0]["rows"][5].pop("reason"), "has no reason"),
    ],
)
def test_a_damaged_document_is_named(tmp_path, damage, problem):
    made = copy.deepcopy(document(ROWS))
    assert results.problems(made) == []
    damage(made)
    with pytest.raises(results.BadResult, match=problem):
        write(tmp_path / "damaged.json", made)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "result.json"
    write_json(path, document(ROWS))
    before = path.read_text()

    def full(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(atomic.os, "replace", full)
    with pytest.raises(OSError):
        write_json(path, document([]))
    assert path.read_text() == before and list(path.parent.iterdir()) == [path]


# ---- GPUs ----------------------------------------------------------------------------------------

GPU = {"name": "SYNTHETIC GPU", "capability": [9, 0], "multiprocessors": 132, "memory_mib": 1}


def on_gpu(folder, name, rows, **what):
    made = document(rows, date="2026-03-01T00:00:00+00:00", device="cuda", gpu=GPU, **what)
    return write(folder / name, made)


def test_without_a_gpu_the_tables_say_that_none_was_measured(result):
    assert ratios.ratios([result]).endswith("\n\nGPUs: not measured.")
    assert "Every case on a GPU: not measured." in report.markdown([result])


def test_a_gpu_is_compared_with_eager_and_with_the_fastest_way_of_pytorch(tmp_path, result):
    """recurx's time is that of `auto`: the family that beats it here is what auto missed."""
    step = [
        row("recurx-auto/bf16", [2.0]), row("recurx-owner-graph/bf16", [1.0]),
        row("eager/bf16", [20.0]), row("graph/bf16", [8.0]), row("reduce-overhead/bf16", [5.0]),
        untimed("recurx-library/bf16", "refused", "absent"),
    ]  # fmt: skip
    train = [row("recurx-triton-tiled/bf16", [100.0]), row("eager/bf16", [90.0])]
    found = [
        result,
        on_gpu(tmp_path, "step.json", step, batch=8),
        on_gpu(tmp_path, "one.json", [row("recurx-auto/bf16", [0.5])], batch=1),
        on_gpu(tmp_path, "train.json", train, mode="train", batch=768),
    ]
    table = ratios.ratios(found)
    cpus, gpus = table.split("\n\n")
    assert "GPU" not in cpus and gpus.splitlines()[2:] == [
        "| SYNTHETIC GPU | trm-att, step | 0.5 (B=1), 2 (B=8) | **10x** (B=8) "
        "| **2.5x** reduce-overhead (B=8) |",
        "| SYNTHETIC GPU | trm-att, training step | 100 (B=768) | **0.90x** (B=768) "
        "| **0.90x** eager (B=768) |",
    ]
    assert "not measured" not in gpus
    everything = report.markdown(found)
    assert "**SYNTHETIC GPU**" in everything and "on a GPU: not measured" not in everything
    assert "recurx-owner-graph bf16" in everything


def test_a_gpu_alone_has_one_table(tmp_path):
    found = on_gpu(
        tmp_path, "step.json", [row("recurx-auto/bf16", [2.0]), row("eager/bf16", [3.0])]
    )
    assert ratios.ratios([found]).startswith("| GPU, bf16 | case |")
