"""The HTML report: whole, without network, and drawn right by a real browser where there is one."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import tempfile
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import recurx
from recurx.bench.profiler.ceilings import Ceilings
from recurx.bench.profiler.report import html
from recurx.bench.profiler.result import Call, Engine, Row, Sync
from recurx.bench.profiler.roofline import roofline
from recurx.models import TRM, TRMConfig
from recurx.train import AdamATan2
from tests.bench.profiler.profile_cases import build, profile

VOID = {"meta", "link", "br"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Page(HTMLParser):
    """Tags, attributes and text; `broken` lists what is not well formed or wants a network."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: dict[str, int] = {}
        self.text: list[str] = []
        self.json = ""
        self.broken: list[str] = []
        self.feed(text)
        self.close()
        self.broken += [f"<{tag}> is not closed" for tag in self.open]
        for scheme in ("http:", "https:", "//cdn", "@import", "url("):
            if scheme in text:
                self.broken.append(f"{scheme} in the page")

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            wants = name in ("src", "href", "xlink:href", "srcset", "action", "data")
            if wants and not (value or "").startswith(("data:", "#")):
                self.broken.append(f"<{tag} {name}={value}>")
        if tag == "script" and ("type", "application/json") not in attributes:
            self.broken.append("<script> with code")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.broken.append(f"</{tag}> closes another element")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.json += data
        else:
            self.text.append(data)


@pytest.fixture(scope="module")
def training() -> recurx.profile.Profile:  # type: ignore[name-defined]
    model = TRM(TRMConfig.tiny(7, 9, batch_size=2, halt_max_steps=2), backend="eager")
    optimizer = AdamATan2(model.parameters())
    return recurx.profile(
        model, batch_size=2, train=True, optimizer=optimizer, seconds=0.5, halting_steps=3
    )


def test_the_page_is_whole_and_wants_no_network(training: Any, tmp_path: Path) -> None:
    training.add_timeline(
        [{"owner": 0, "call": 0, "block": 0, "phase": "a&b<", "start_ns": 0, "end_ns": 9}]
    )
    training.save_html(tmp_path / "profile.html")
    page = Page((tmp_path / "profile.html").read_text(encoding="utf-8"))
    assert not page.broken
    text = "".join(page.text)
    for row in training.rows:
        assert row.label in text and f"{row.ms:.3f}" in text
    for call in training.calls:
        assert f"call {call.call}: net L" in text
    for sync in training.syncs:
        assert sync.place in text
    for title in ("Stages", "The step in time", "Roofline", "Net calls", "Host syncs", "Halting",
                  "Inside the kernel", "What recurx would replace", "For Nsight"):  # fmt: skip
        assert title in text
    assert "a&b<" in text and page.tags["svg"] == 2 and page.tags["circle"] >= 8
    assert "nsys profile" in text and "ncu --set full" in text
    assert json.loads(page.json)["ms"] == training.ms


def test_fused_and_patched_models_have_their_page() -> None:
    model = build("trm")
    with recurx.patch(model):
        page = Page(html(profile(model)))
    assert not page.broken and "phase of the engine" in "".join(page.text)


def test_no_value_becomes_a_tag(training: Any) -> None:
    """Every text of a result, in its place on the page and in the numbers at its end."""
    evil = "</script><b a='\"'>&"
    place = Sync(evil, evil, evil, evil, 1)
    rows = [dataclasses.replace(training.rows[0], name=evil, label=evil), *training.rows[1:]]
    engine = Engine(evil, evil, 1.0, 1.0, [(evil, 1.0, 0.0)])
    made = dataclasses.replace(
        training, title=evil, kind=evil, dtype=evil, device=evil, versions={"torch": evil},
        rows=rows, calls=[Call(0, 0, 0, evil, 1.0, 0.0)], syncs=[place], engines=[engine],
        advice=[evil], notes=[evil], commands=[evil],
        ceilings=Ceilings(1.0, {evil: 1.0}), ops=[dataclasses.replace(training.ops[0], stage=evil)],
    )  # fmt: skip
    page = Page(html(made))
    assert not page.broken and page.tags["script"] == 1
    assert page.tags["b"] == Page(html(training)).tags["b"]
    assert "".join(page.text).count(evil) > 15 and json.loads(page.json)["title"] == evil


@pytest.mark.parametrize(
    "damage",
    ["<img src='https://example.org/x.png'>", "<script>alert(1)</script>", "<p>", "</div>",
     "<link rel='stylesheet' href='style.css'>", "<i style='background: url(x)'></i>"],
)  # fmt: skip
def test_a_page_that_is_broken_or_wants_a_network_is_seen(damage: str, training: Any) -> None:
    page = html(training).replace("<body>", "<body>" + damage)
    assert Page(page).broken


def test_roofline_puts_a_stage_where_it_belongs() -> None:
    """A stage at the ridge of the roof touches it, one at half the rate lies below."""
    roofs = Ceilings(gbs=100.0, tflops={"float32": 1.0})
    best = Row("gate_up", "g", "net", ms=1, share=0.5, flops=1e9, bytes=1e8, tflops=1.0)
    half = Row("norm", "n", "net", ms=1, share=0.5, flops=1e8, bytes=1e8, tflops=0.05)
    drawing = roofline([best, half], roofs)
    assert drawing is not None
    discs, (_, ridge, _) = drawing.discs, drawing.roof
    assert discs[0].y == pytest.approx(ridge[1], abs=0.2)
    assert discs[0].x == pytest.approx(ridge[0], abs=0.2)  # 10 FLOP per byte is the ridge
    assert discs[1].y > discs[0].y
    assert roofline([Row("x", "x", "net", flops=0, bytes=5)], roofs) is None


# ---- in a browser ----------------------------------------------------------------------------


def screenshot(page: Path, width: int, height: int, dark: bool) -> np.ndarray[Any, Any]:
    """Pixels [height, width, 3] of a page, drawn by the browser of this machine."""
    browser = next((found for found in map(shutil.which, BROWSERS) if found), None)
    if browser is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)} is installed")
    target = page.with_suffix(f".{width}.{'dark' if dark else 'light'}.png")
    with tempfile.TemporaryDirectory() as folder:
        theme = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
             "--no-first-run", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", "--hide-scrollbars", f"--user-data-dir={folder}", *theme,
             f"--window-size={width},{height}", f"--screenshot={target}", page.as_uri()],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
    return read_png(target.read_bytes())


def read_png(data: bytes) -> np.ndarray[Any, Any]:
    """Pixels of an 8-bit RGB or RGBA PNG without interlacing (all that browsers write)."""
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    depth, kind, interlaced = data[24], data[25], data[28]
    assert (depth, interlaced) == (8, 0) and kind in (2, 6), "another kind of PNG"
    channels = 3 if kind == 2 else 4
    packed, at = b"", 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"IDAT":
            packed += data[at + 8 : at + 8 + length]
        at += 12 + length
    raw = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, -1)
    rows = np.zeros((height + 1, width + 1, channels), np.int64)  # a border of zeros
    for y in range(height):
        line = raw[y, 1:].reshape(width, channels).astype(np.int64)
        above, filtered = rows[y], raw[y, 0]
        if filtered == 0:
            rows[y + 1, 1:] = line
        elif filtered == 2:
            rows[y + 1, 1:] = (line + above[1:]) & 255
        elif filtered == 1:
            rows[y + 1, 1:] = np.cumsum(line, axis=0) & 255
        else:
            row = rows[y + 1]
            for x in range(width):
                left, up, corner = row[x], above[x + 1], above[x]
                if filtered == 3:
                    guess = (left + up) // 2
                else:
                    pa, pb, pc = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
                    guess = np.where((pa <= pb) & (pa <= pc), left, np.where(pb <= pc, up, corner))
                row[x + 1] = (line[x] + guess) & 255
    return rows[1:, 1:, :3].astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "width,height,dark", [(390, 1000, True), (390, 1000, False), (900, 700, False)]
)
def test_a_browser_draws_it(
    training: Any, tmp_path: Path, width: int, height: int, dark: bool
) -> None:
    path = tmp_path / "profile.html"
    training.save_html(path)
    pixels = screenshot(path, width, height, dark)
    assert pixels.shape == (height, width, 3)
    background = pixels[2, 2]
    assert (background.max() < 60) if dark else (background.min() > 230)
    # Nothing sticks out to the right: tables and pictures scroll inside their frames.
    assert (pixels[:, -4:] == background).all()
    blue = np.array([0x4A, 0x94, 0xEA] if dark else [0x2A, 0x78, 0xD6])
    assert (
        np.abs(pixels.astype(int) - blue).sum(-1) < 12
    ).sum() > 250  # key and bars of the products
    text = np.abs(pixels.astype(int) - background.astype(int)).sum(-1) > 300
    assert 0.005 < text.mean() < 0.3


def test_reading_a_png() -> None:
    """All five filters, on random pixels."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (5, 7, 3), generator=generator).numpy()
    padded = np.zeros((6, 8, 3), int)
    padded[1:, 1:] = image
    lines = b""
    for y in range(5):
        left, up, corner = padded[y + 1, :-1], padded[y, 1:], padded[y, :-1]
        p = left + up - corner
        pa, pb, pc = abs(p - left), abs(p - up), abs(p - corner)
        paeth = np.where((pa <= pb) & (pa <= pc), left, np.where(pb <= pc, up, corner))
        guess = [0 * left, left, up, (left + up) // 2, paeth][y]
        lines += bytes([y]) + ((image[y] - guess) & 255).astype(np.uint8).tobytes()

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + b"\0\0\0\0"

    head = (7).to_bytes(4, "big") + (5).to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines))
    assert (read_png(data) == image).all()
