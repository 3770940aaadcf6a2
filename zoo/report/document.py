"""A document of sections, tables and charts, written as Markdown or as one HTML page that needs nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from zoo.report.page import page


@dataclass(frozen=True)
class Table:
    """Cells hold plain text, `code` and **strong**; the first `left` columns are text, the others figures. `colours`:
    an architecture's number for each row, shown before its first word that is a name, column `keyed`."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    colours: Sequence[int | None] = ()
    keyed: int = 0


@dataclass(frozen=True)
class Bullets:
    lines: Sequence[str]


@dataclass(frozen=True)
class Chart:
    """An SVG element under its title; charts that follow each other stand side by side where there is room."""

    title: str
    svg: str


@dataclass(frozen=True)
class Folded:
    """What a page shows only when asked."""

    title: str
    block: Table | Bullets


Block = str | Table | Bullets | Chart | Folded


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    title: str
    sections: Sequence[Section]


def to_markdown(document: Document) -> str:
    """Charts are left to the page."""
    parts = [f"# {document.title}"]
    for section in document.sections:
        shown = [text for block in section.blocks if (text := _markdown(block))]
        if shown:
            parts += [f"## {section.title}", *shown]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, str):
        return block
    if isinstance(block, Bullets):
        return "\n".join(f"- {line}" for line in block.lines)
    if isinstance(block, Chart):
        return ""
    if isinstance(block, Folded):
        return f"{block.title}:\n\n{_markdown(block.block)}"
    rule = ["---" if number < block.left else "---:" for number in range(len(block.head))]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
                     for row in (block.head, rule, *block.rows))


def to_html(document: Document) -> str:
    parts = [f"<h1>{_inline(document.title)}</h1>"]
    for section in document.sections:
        parts.append(f"<section><h2>{_inline(section.title)}</h2>")
        charts: list[str] = []
        for block in section.blocks:
            if isinstance(block, Chart):
                charts.append(f"<figure><figcaption>{_inline(block.title)}</figcaption>{block.svg}</figure>")
                continue
            parts += _side_by_side(charts)
            parts.append(_html(block))
        parts += [*_side_by_side(charts), "</section>"]
    return page(escape(document.title), "\n".join(parts))


def _side_by_side(charts: list[str]) -> list[str]:
    """The charts gathered so far as one block; none are left."""
    shown = [f'<div class="charts">{"".join(charts)}</div>'] if charts else []
    charts.clear()
    return shown


def _html(block: str | Table | Bullets | Folded) -> str:
    if isinstance(block, str):
        return f"<p>{_inline(block)}</p>"
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{_inline(line)}</li>" for line in block.lines) + "</ul>"
    if isinstance(block, Folded):
        return f"<details><summary>{_inline(block.title)}</summary>{_html(block.block)}</details>"
    rows = []
    for number, row in enumerate((block.head, *block.rows)):
        tag, cells = "td" if number else "th", []
        for column, cell in enumerate(row):
            colour = block.colours[number - 1] if number and block.colours and column == block.keyed else None
            key = "" if colour is None else f'<i class="key" style="--c:var(--c{colour % 8})"></i>'
            kind = "" if column < block.left else ' class="figure"'
            cells.append(f"<{tag}{kind}>{key}{_inline(cell)}</{tag}>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="table"><table><thead>{rows[0]}</thead><tbody>{"".join(rows[1:])}</tbody></table></div>'


def _inline(text: str) -> str:
    """`code` and **strong**, which may hold code, as HTML; all else as it is."""
    parts, last = [], 0
    for match in re.finditer(r"`([^`]*)`|\*\*(.+?)\*\*", text):
        parts.append(escape(text[last:match.start()]))
        code, strong = match.groups()
        parts.append(f"<strong>{_inline(strong)}</strong>" if strong else f"<code>{escape(code or '')}</code>")
        last = match.end()
    return "".join(parts) + escape(text[last:])
