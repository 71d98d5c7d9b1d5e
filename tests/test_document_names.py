"""What documents name exists: files, modules, attributes, links; and the front door stays short."""

from __future__ import annotations

import fnmatch
import re
from functools import cache
from pathlib import Path
from pkgutil import resolve_name

import pytest

import pages
from pages import PAGES, ROOT
from recurx.bench import ratios, results

LENGTHS = {"README.md": 150, "CONTRIBUTING.md": 130}  # lines at most
LONGEST = 100  # characters of a line of prose, as in the code
SOURCES = ("py", "cpp", "hpp", "cu", "cuh", "h", "toml")
SUFFIXES = (*SOURCES, "md", "sh", "json", "png", "npz", "safetensors")
# Files that runs write, and the reader's own.
WRITTEN = ("tensorboard/", "model.safetensors", "state.safetensors", "metrics.jsonl",
           "result.json", "runs/*",
           "puzzles.txt", "mazes.csv", "all_config.yaml", "sudoku-9x9.safetensors")  # fmt: skip


def is_path(span: str) -> bool:
    """Whether inline code is meant as a path in this repository."""
    if not re.fullmatch(r"[\w.@-]*[\w./*{},-]+", span) or span.startswith(("/", "-", "~")):
        return False
    stem, _, ending = span.rpartition(".")
    return (bool(stem) and ending in SUFFIXES) or (span.endswith("/") and len(span) > 1)


def expanded(span: str) -> list[str]:
    """a/{b,c}.py -> a/b.py, a/c.py."""
    found = re.search(r"\{([^}]*)\}", span)
    if not found:
        return [span]
    parts = found[1].split(",")
    return [name for p in parts for name in expanded(span.replace(found[0], p, 1))]


@cache
def places() -> frozenset[str]:
    """Every tracked file and every folder that holds one."""
    found = set(pages.tracked())
    for name in pages.tracked():
        found |= {f"{parent}/" for parent in map(str, Path(name).parents) if parent != "."}
    return frozenset(found)


def exists(path: str, beside: Path) -> bool:
    """Whether a path exists: beside the page, below the root, or as the end of one path."""
    own = str((beside / path).relative_to(ROOT)) + ("/" if path.endswith("/") else "")
    patterns = (own, path, f"*/{path}")
    return any(fnmatch.fnmatchcase(place, p) for p in patterns for place in places())


@pytest.mark.parametrize("name", PAGES)
def test_every_path_exists(name):
    page = PAGES[name]
    for span in filter(is_path, pages.spans(page)):
        for path in expanded(span):
            written = any(fnmatch.fnmatchcase(path, pattern) for pattern in WRITTEN)
            assert written or exists(path, page.parent), f"{name}: no file `{path}`"


@pytest.mark.parametrize("name", PAGES)
def test_every_name_of_recurx_exists(name):
    for span in pages.spans(PAGES[name]):
        found = re.match(r"recurx(\.\w+)+", span)
        if found and not is_path(span):
            resolve_name(found[0])


@cache
def words_of_the_sources() -> frozenset[str]:
    found: set[str] = set()
    for name in pages.tracked():
        if name.endswith(SOURCES) or name == "Makefile":
            found |= set(re.findall(r"\w+", (ROOT / name).read_text(encoding="utf-8")))
    return frozenset(found)


@pytest.mark.parametrize(
    "name", [name for name in PAGES if "NOTES" in name or name == "CONTRIBUTING.md"]
)
def test_every_identifier_of_the_notes_stands_in_the_sources(name):
    for span in pages.spans(PAGES[name]):
        if is_path(span) or not re.fullmatch(r"[\w.:]+(\(.*\))?", span):
            continue
        for word in re.findall(r"[A-Za-z_]\w{2,}", span.partition("(")[0]):
            assert word in words_of_the_sources(), f"{name}: `{span}`: no source says {word}"


@pytest.mark.parametrize("name", PAGES)
def test_every_link_and_picture_leads_somewhere(name):
    for target in pages.links(PAGES[name]):
        if not re.match(r"[a-z]+://|#", target):
            path = PAGES[name].parent / target.partition("#")[0]
            assert path.exists(), f"{name}: no {target}"


@pytest.mark.parametrize("name, most", LENGTHS.items())
def test_the_front_door_is_short(name, most):
    assert len(PAGES[name].read_text(encoding="utf-8").splitlines()) <= most


def test_the_walk_to_each_kernel_has_at_most_five_files():
    """api and route, then the row of an engine: backend, launcher, kernel, each an existing file
    that the one before it leads to."""
    text = PAGES["CONTRIBUTING.md"].read_text(encoding="utf-8")
    section = text.partition("## The walk")[2].partition("\n## ")[0]
    rows = [line.split("|")[2:5] for line in section.splitlines() if line.startswith("| ")][1:]
    assert {row[0].split("/")[-1].split("`")[0] for row in rows} == {
        "cpu.py", "cpu_window.py", "triton.py", "triton_window.py", "cuda.py"
    }  # fmt: skip
    for row in rows:
        walk = ["recurx/api.py", "recurx/route.py"]
        walk += [found[1] for cell in row if (found := re.search(r"`([^`]+/[^`]+)`", cell))]
        assert len(walk) <= 5 and all((ROOT / name).is_file() for name in walk), walk


@pytest.mark.parametrize("name", PAGES)
def test_lines_of_prose_are_as_long_as_those_of_code(name):
    for number, line in enumerate(pages.prose(PAGES[name]).splitlines(), 1):
        long = len(line) > LONGEST and not line.startswith(("|", "![", "    "))
        assert not long or "](" in line, f"{name}:{number}: {len(line)} characters"


def test_the_table_of_ratios_is_that_of_the_result_files():
    text = PAGES["README.md"].read_text(encoding="utf-8")
    found = results.load_folder(ROOT / "bench" / "results")
    assert ratios.ratios(found) in text, "make bench-report writes it anew"
    measured = any(result.facts.get("gpu") for result in found)
    assert ("not measured" in text) != measured, "the README says whether GPU figures are missing"


def test_the_readme_names_what_an_install_needs():
    text = " ".join(PAGES["README.md"].read_text(encoding="utf-8").split())
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = project.partition("\ndependencies = [")[2].partition("\n]")[0]
    for package, oldest in re.findall(r'"(\w+)(?:>=([\d.]+))?"', needed):
        assert f"{package} {oldest} or newer" in text if package == "torch" else package in text
    assert f"Python {re.search(r'requires-python = .>=([0-9.]+)', project)[1]} or newer" in text


def test_what_is_missing_is_found():
    assert is_path("recurx/api.py") and is_path("csrc/cuda/") and is_path("{a,b}.cuh")
    assert not is_path("a/b") and not is_path("recurx.api") and not is_path("/tmp/x.py")
    assert expanded("a/{b,c}.py") == ["a/b.py", "a/c.py"]
    assert exists("recurx/api.py", ROOT) and exists("api.py", ROOT) and exists("bench/", ROOT)
    assert not exists("recurx/nowhere.py", ROOT) and not exists("nowhere/", ROOT)
    with pytest.raises(AttributeError):
        resolve_name("recurx.nothing")
