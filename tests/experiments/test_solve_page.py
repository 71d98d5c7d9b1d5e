"""`solve --html`: every step of every board stands in the page, with q, and it wants no network."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import recurx
from recurx import tasks
from recurx.commands import main
from recurx.experiments.answering import page
from recurx.experiments.tasks.sudoku.layout import to_boards
from recurx.models import TRM, TRMConfig

TASK = tasks.get("sudoku-4x4")


class Read(HTMLParser):
    """The boards of each section: cells as (class names, text), and captions."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: list[dict] = []
        self.open: list[str] = []
        self.broken: list[str] = []
        self.script = ""
        self.feed(text)
        self.close()
        self.broken += self.open
        for wants in ("http:", "https:", "//cdn", "@import", "url(", "fetch(", "XMLHttp"):
            self.broken += [wants] * (wants in text)

    def handle_starttag(self, tag, attributes) -> None:
        told = dict(attributes)
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)
        for name in ("src", "href", "action"):
            if name in told and not told[name].startswith("data:"):
                self.broken.append(f"{tag} {name}")
        if tag == "section":
            self.sections.append({"boards": [], "captions": [], "title": ""})
        elif tag == "input":
            self.sections[-1]["slider"] = told
        elif tag == "figure":
            self.sections[-1]["boards"].append([])
            self.sections[-1]["captions"].append("")
        elif tag == "td":
            self.sections[-1]["boards"][-1].append([set(told["class"].split()), ""])

    def handle_endtag(self, tag) -> None:
        if not self.open or self.open.pop() != tag:
            self.broken.append(f"</{tag}>")

    def handle_data(self, data) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "td":
            self.sections[-1]["boards"][-1][-1][1] += data
        elif inside == "figcaption":
            self.sections[-1]["captions"][-1] += data
        elif inside == "h2":
            self.sections[-1]["title"] += data
        elif inside == "script":
            self.script += data


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    config = TRMConfig.tiny(6, 16, hidden_size=32, num_heads=2, H_cycles=1, L_cycles=1)
    model = TRM(config)
    with torch.no_grad():
        model.inner.q_head.weight.normal_(std=0.3)
    recurx.save_checkpoint(path, model, {"task": "sudoku-4x4"})
    return str(path)


HOWS = {
    "one try": [],
    "several at once": ["--rollouts", "3", "--init", "random"],
    "in turn": ["--rollouts", "3", "--init", "random", "--select", "rules"],
    "search": ["--search", "--budget", "3", "--starts", "2"],
}


@pytest.mark.parametrize("name", HOWS)
def test_every_step_is_drawn_as_it_was(name: str, net: str, tmp_path, capsys) -> None:
    inputs = TASK.generate(np.random.default_rng(1), 2).inputs
    lines = ["".join(map(str, board)) for board in (inputs - 1).tolist()]
    path = tmp_path / "boards.html"
    more = ["--max-steps", "5", "--halt-above", "0.3", *HOWS[name]]
    code = main(["solve", *lines, "--checkpoint", net, "--html", str(path), *more, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert code in (0, 1)
    read = Read(path.read_text(encoding="utf-8"))
    assert not read.broken and len(read.sections) == 2
    for puzzle, section in zip(inputs, read.sections, strict=True):
        question, *steps = section["boards"]
        assert [cell for _, cell in question] == [d or "" for d in _texts(to_boards(puzzle))]
        assert section["slider"]["max"] == str(len(steps)) and 1 <= len(steps) <= 5
        before = question
        for board in steps:
            values = np.array([int(cell or 0) for _, cell in board])
            twice = TASK.layout.twice(values)
            for at, (names, cell) in enumerate(board):
                assert ("given" in names) == (puzzle[at] > 1)
                assert ("changed" in names) == (cell != before[at][1])
                assert ("wrong" in names) == twice[at]
            before = board
        captions = section["captions"][1:]
        assert all("q " in caption and "sure by" in caption for caption in captions)
    if name == "one try":
        model = recurx.load_checkpoint(net).build()
        batch = {"inputs": torch.from_numpy(inputs)}
        found = recurx.solve(model, batch, 5, halt_above=0.3, trace=True)
        for row, section in enumerate(read.sections):
            assert len(section["boards"]) - 1 == int(found.steps[row]) == result["steps"][row]
            for step, board in enumerate(section["boards"][1:]):
                shown = [int(cell or 0) for _, cell in board]
                assert shown == to_boards(found.trace[step, row].numpy()).tolist()
            # q after n steps is q of a run that may take n.
            for step, caption in enumerate(section["captions"][1:], start=1):
                short = recurx.solve(model, {"inputs": batch["inputs"][row : row + 1]}, step, None)
                assert f"q {float(short.q[0]):.2f}," in caption


def _texts(board: np.ndarray) -> list[str]:
    return [str(digit) if digit else "" for digit in board.tolist()]


def test_q_of_the_picked_try_is_found_among_those_made_together() -> None:
    # Two batches: one try of two steps; then three tries of 1, 3 and 2 steps, rows that ended gone.
    seen = [[0.1], [0.2], [1.0, 2.0, 3.0], [2.1, 3.1], [2.2]]
    steps, at_once = [2, 1, 3, 2], [1, 3]
    assert page.q_of_steps(seen, steps, at_once, 2.2) == [2.0, 2.1, 2.2]
    assert page.q_of_steps(seen, steps, at_once, 3.1) == [3.0, 3.1]
    assert page.q_of_steps(seen, steps, at_once, 0.2) == [0.1, 0.2]


@pytest.mark.parametrize(
    "damage", ["<img src='https://example.org/x.png'>", "<p>", "</div>", "<i style='url(x)'></i>"]
)
def test_a_broken_page_is_seen(damage: str, net: str, tmp_path) -> None:
    path = tmp_path / "boards.html"
    main(["solve", "1" + "." * 15, "--checkpoint", net, "--html", str(path), "--max-steps", "2"])
    assert Read(path.read_text().replace("<h1>", damage + "<h1>")).broken


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
def test_the_slider_shows_one_step(tmp_path: Path) -> None:
    """The script in node, with as much of a document as it uses."""
    document = """
    const classes = () => { const s = new Set(); return {add: (n) => s.add(n), has: (n) => s.has(n),
      toggle: (n, on) => on ? s.add(n) : s.delete(n)}; };
    const figures = [0, 1, 2].map(() => ({classList: classes()}));
    const slider = {value: "2", hidden: true};
    const section = {classList: classes(), querySelectorAll: () => figures,
      querySelector: () => slider};
    const document = {querySelectorAll: () => [section]};
    const now = () => figures.map((f) => f.classList.has("now") ? 1 : 0).join("");
    """
    after = """
    const at = [now()]; slider.value = "0"; slider.oninput(); at.push(now());
    console.log(at.join(" "), slider.hidden, section.classList.has("shown"));
    """
    file = tmp_path / "slider.js"
    file.write_text(document + page.SCRIPT + after)
    said = subprocess.run(["node", str(file)], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["001", "100", "false", "true"]


# ---- in a real browser ---------------------------------------------------------------------------

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
WATCH = """<script>const refused = []; document.addEventListener("securitypolicyviolation",
  (event) => refused.push(event.blockedURI));</script>"""
# Moves each slider as a hand would, and tells which steps are laid out, and what the page fetched.
DRIVE = """<script>
const told = [...document.querySelectorAll("section")].map((section) => {
  const slider = section.querySelector("input"), steps = [...section.querySelectorAll("figure")];
  const shown = () => steps.map((step) => step.getClientRects().length).join("");
  const at = [shown()];
  for (const step of [0, 1]) {
    slider.value = step; slider.dispatchEvent(new Event("input")); at.push(shown());
  }
  const now = steps.find((step) => step.getClientRects().length);
  const cells = [...now.querySelectorAll("td")].map((cell) => cell.getBoundingClientRect());
  return {at, text: now.innerText, slider: slider.getClientRects().length,
    cells: cells.filter((cell) => cell.width > 20 && cell.height > 20).length,
    given: getComputedStyle(now.querySelector("td.given")).fontWeight};
});
setTimeout(() => { const out = document.createElement("pre"); out.id = "told";
  const fetched = performance.getEntriesByType("resource").map((entry) => entry.name);
  out.textContent = JSON.stringify({told, refused, fetched}); document.body.append(out); }, 300);
</script>"""


def in_browser(path: Path, text: str, folder: Path) -> dict:
    """What the page of this text shows and wants."""
    text = text.replace("<body>", f"<body>{WATCH}").replace("</body>", f"{DRIVE}</body>")
    path.write_text(text, encoding="utf-8")
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--no-first-run", "--disable-background-networking", f"--user-data-dir={folder}",
             "--virtual-time-budget=3000", "--dump-dom", path.as_uri()]  # fmt: skip
    dom = subprocess.run([BROWSER, *words], capture_output=True, text=True, timeout=500).stdout
    found = re.search(r'<pre id="told">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no chromium on PATH")
def test_a_browser_shows_the_board_and_steps_and_asks_no_network(net: str, tmp_path) -> None:
    inputs = TASK.generate(np.random.default_rng(1), 2).inputs
    lines = ["".join(map(str, board)) for board in (inputs - 1).tolist()]
    path = tmp_path / "boards.html"
    main(["solve", *lines, "--checkpoint", net, "--html", str(path), "--max-steps", "3",
          "--halt", "none"])  # fmt: skip
    text = path.read_text(encoding="utf-8")
    seen = in_browser(path, text, tmp_path / "profile")
    assert seen["refused"] == [] and seen["fetched"] == []
    first_steps = [section["boards"][1] for section in Read(text).sections]
    for section, board in zip(seen["told"], first_steps, strict=True):
        assert section["at"] == ["0001", "1000", "0100"] and section["slider"] == 1
        assert section["cells"] == 16 and int(section["given"]) >= 600
        table, _, caption = section["text"].strip().rpartition("\n")
        assert "".join(table.split()) == "".join(cell for _, cell in board)
        assert caption.startswith("step 1 of 3, q ")
    # The same eyes see a page that wants something, and one whose style hides the steps.
    wanting = text.replace("<h1>", "<img src='http://127.0.0.1:9/x.png'><h1>")
    assert in_browser(path, wanting, tmp_path / "profile")["refused"]
    hidden = text.replace(".shown figure.now", ".shown figure.never")
    with pytest.raises(AssertionError):
        in_browser(path, hidden, tmp_path / "profile")
