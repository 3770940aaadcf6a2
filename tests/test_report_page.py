"""The page and its charts: colours that all can tell apart, marks at round values, and nothing from elsewhere."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from zoo.report.document import Bullets, Chart, Document, Folded, Section, Table, to_html, to_markdown
from zoo.report.page import DARK, GROUND, LIGHT
from zoo.report.runs import find_runs
from zoo.report.svg import COLOURS, HEIGHT, RIGHT, WIDTH, Axis, Series, _even_ticks, _log_ticks, dot_chart, line_chart
from zoo.report.words import context_of, large, memory, quoted

# How linear RGB is seen without one kind of cone: Machado, Oliveira, Fernandes 2009, severity 1.
VISION = {
    "normal": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}
PALETTES = {"light": LIGHT, "dark": DARK}


def linear(colour: str) -> list[float]:
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def lab(rgb: list[float]) -> list[float]:
    """CIE L*a*b* of linear RGB, in which 2.3 is a difference that is just noticed."""
    r, g, b = (min(1.0, max(0.0, part)) for part in rgb)
    xyz = ((0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.95047, 0.2126 * r + 0.7152 * g + 0.0722 * b,
           (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.08883)
    x, y, z = (part ** (1 / 3) if part > 0.008856 else 7.787 * part + 16 / 116 for part in xyz)
    return [116 * y - 16, 500 * (x - y), 200 * (y - z)]


def luminance(colour: str) -> float:
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear(colour), strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_stand_out_from_the_ground(scheme: str) -> None:
    ground = luminance(GROUND[scheme])
    assert len(PALETTES[scheme]) == COLOURS
    for colour in PALETTES[scheme]:
        high, low = max(ground, luminance(colour)), min(ground, luminance(colour))
        assert (high + 0.05) / (low + 0.05) >= 3.6, colour  # 3 is what WCAG asks of graphics


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("vision", sorted(VISION))
def test_colours_are_told_apart(scheme: str, vision: str) -> None:
    seen = {colour: lab([sum(a * b for a, b in zip(row, linear(colour), strict=True)) for row in VISION[vision]])
            for colour in PALETTES[scheme]}
    for one, other in itertools.combinations(seen, 2):
        assert sum((a - b) ** 2 for a, b in zip(seen[one], seen[other], strict=True)) ** 0.5 >= 20, (one, other)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.59, 1.71), (-0.03, 0.12), (0.001, 0.0011), (12, 98_000)])
def test_even_marks_are_round_and_few(low: float, high: float) -> None:
    ticks = _even_ticks(low, high)
    assert 3 <= len(ticks) <= 11
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    step = ticks[1] - ticks[0]
    assert f"{step:.1e}"[:3] in ("1.0", "2.0", "5.0")


@pytest.mark.parametrize(("base", "low", "high", "wanted"), [
    (2, 512, 32768, [512, 1024, 2048, 4096, 8192, 16384, 32768]),
    (10, 900, 1_100_000, [1e3, 1e4, 1e5, 1e6]),
    (10, 2, 30, [2, 5, 10, 20]),
    (10, 1.9, 310, [3, 10, 30, 100, 300]),
    (10, 7800, 12_600, [8000, 9000, 10_000, 11_000, 12_000]),
    (2, 900, 1100, [1024]),
    (2, 1100, 1300, [1100, 1150, 1200, 1250, 1300]),
])
def test_log_marks(base: int, low: float, high: float, wanted: list[float]) -> None:
    from math import log

    assert _log_ticks(base, log(low), log(high)) == pytest.approx(wanted)


def test_a_chart_is_drawn_where_its_values_are() -> None:
    lines = [Series("a<b", [(1, 1.0, "first & last"), (100, 3.0, "end")], 0), Series("peer", [(1, 2.0, "x")], None)]
    root = ElementTree.fromstring(line_chart(lines, Axis("tokens", large, 10), Axis("bits"), 'said "aloud"'))
    assert root.get("aria-label") == 'said "aloud"'
    names = [text.text for text in root.iter("text")]
    assert {"a<b", "peer", "tokens", "bits", "1.0", "2.0", "3.0", "1", "10", "100"} <= set(names)
    assert [title.text for title in root.iter("title")] == ["first & last", "end", "x"]
    hits = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter("circle") if c.get("class") == "hit"]
    (x0, y0), (x1, y1), (x2, y2) = hits
    assert 0 < x0 == x2 < x1 < WIDTH - RIGHT
    assert 0 < y1 < y2 < y0 < HEIGHT
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)


def test_names_do_not_overlap_and_stay_inside() -> None:
    lines = [Series(f"n{i}", [(1, 1.0, ""), (2, 1.0 + i * 1e-3 + (i == 9), "")], i) for i in range(10)]
    root = ElementTree.fromstring(line_chart(lines, Axis("x"), Axis("y"), ""))
    levels = [float(text.get("y")) for text in root.iter("text") if text.get("class") == "name"]
    assert len(levels) == 10
    gaps = [b - a for a, b in itertools.pairwise(sorted(levels))]
    assert min(gaps) >= 13.9
    assert max(levels) <= HEIGHT - 30
    dashed = [path.get("style") for path in root.iter("path") if path.get("class") == "line"]
    assert [("--dash" in style) for style in dashed] == [False] * COLOURS + [True] * 2


def test_what_is_beyond_the_limits_has_no_dot() -> None:
    line = Series("a", [(1, 9.0, "far"), (2, 1.5, "near"), (3, 1.0, "nearer")], 0)
    chart = line_chart([line], Axis("x"), Axis("y", limits=(1.0, 2.0)), "")
    assert "near</title>" in chart
    assert "far" not in chart


def test_a_single_value_is_a_chart_too() -> None:
    for x in (Axis("x"), Axis("x", large, 10)):
        ElementTree.fromstring(line_chart([Series("a", [(5, 2.0, "")], 0)], x, Axis("y", signed=True), ""))
        ElementTree.fromstring(dot_chart([Series("a", [(5, 0.0, "")], 0)], x, ""))


def everything(text: str) -> Document:
    return Document(text, [Section(text, [text, Bullets([text]), Table([text, "n"], [[text, "1"]], 1, [0]),
                                          Chart(text, line_chart([Series(text, [(1, 1, text)], 0)], Axis(text),
                                                                 Axis(text), text)),
                                          Folded(text, Bullets([text]))])])


def test_text_is_never_markup() -> None:
    page = to_html(everything("<script>alert('&\"')</script>"))
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_a_page_is_whole_and_needs_nothing() -> None:
    page = to_html(everything("plain, `co<de`, **strong `and` code**"))
    assert re.search(r"(?i)(https?:|src=|@import|url\()", page) is None
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page
    assert "<code>co&lt;de</code>, <strong>strong <code>and</code> code</strong>" in page
    opened: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "circle", "line", "path"):
                opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in ("circle", "line", "path"):
                assert opened.pop() == tag

    Checker().feed(page)
    assert not opened


def test_markdown_tables() -> None:
    text = to_markdown(Document("T", [Section("S", [Table(["a", "b"], [["x|y", "1"]])]), Section("charts", [
        Chart("c", "<svg/>")])]))
    assert text == "# T\n\n## S\n\n| a | b |\n| --- | ---: |\n| x\\|y | 1 |\n"  # a section of charts alone is left out


def test_figures_in_words() -> None:
    assert [large(v) for v in (1, 999, 6.85e15, 1e18, 2e25)] == ["1", "999", "6.85P", "1E", "2e+04Z"]
    assert [context_of(v) for v in (1, 512, 1024, 2293.5, 65536)] == ["1", "512", "1k", "2.24k", "64k"]
    assert [memory(v) for v in (100, 1023, 1024, 540_672, 9 << 30)] == ["100 B", "1023 B", "1 KiB", "528 KiB", "9 GiB"]
    assert quoted("a `b`") == "`a 'b'`"


@pytest.mark.parametrize(("folders", "names"), [
    (["s/data.path=_c,model=a,seed=1", "s/data.path=_c,model=b,seed=1"], ["model=a", "model=b"]),
    (["s/model=a,seed=1", "s/model=a,seed=1,n=2"], ["model=a,seed=1", "model=a,seed=1,n=2"]),
    (["s/one", "s/two"], ["one", "two"]), (["s/model=a,seed=1"], ["model=a,seed=1"]),
    (["s/model=a,seed=1", "t/model=a,seed=1"], ["s/model=a", "t/model=a"])])
def test_runs_have_the_shortest_names_that_differ(folders: list[str], names: list[str], tmp_path: Path) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "run.json").write_text("{}")
    assert list(find_runs([tmp_path / folder for folder in folders])) == names
