"""A document of blocks, written as one self-contained HTML page or as Markdown.

All text is escaped: a checkpoint or a class named `<script>` stays a name. Between backticks stands
code. The page asks the network for nothing: its pictures are inside it.
"""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_TICKS = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Text:
    """A paragraph; `kind` is '' or 'note', 'hole', 'lede'."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Tile:
    """A headline number: what it is, its value, what stands beside it."""

    label: str
    value: str
    beside: str


@dataclass(frozen=True)
class Tiles:
    """Headline numbers side by side."""

    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Mark:
    """A cell with a meaning.

    Attributes:
        text: what stands there.
        kind: `plain`, `near`, `above`, `below` (a printed number), or `reduced`.
        why: shown on demand.
    """

    text: str
    kind: str
    why: str


Cell = str | Mark


@dataclass(frozen=True)
class Line:
    """A row of a table; `kind` is '' or 'grey', 'strong', 'sum', 'rule'."""

    cells: Sequence[Cell]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table; a first column of words, then numbers or words.

    Attributes:
        head: names of the columns.
        lines: its rows; a row of one cell spans the table.
        groups: (name, number of columns) above the head.
        numbers: whether all but the first column are numbers.
        sortable: whether a reader may sort, filter and compare its rows.
    """

    head: Sequence[str]
    lines: Sequence[Line]
    groups: Sequence[tuple[str, int]] = ()
    numbers: bool = False
    sortable: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure or photograph.

    Attributes:
        content: an SVG's text or a PNG's bytes.
        path: where Markdown finds it, relative to the report.
        caption: what it shows, for readers who do not see it too.
    """

    content: str | bytes
    path: str
    caption: str


@dataclass(frozen=True)
class Commands:
    """Lines to type."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Folded:
    """Blocks that a reader opens when wanted."""

    title: str
    blocks: Sequence["Block"]


Block = Text | Tiles | Table | Picture | Commands | Folded


@dataclass
class Section:
    """A heading and its blocks."""

    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass
class Document:
    """A title, blocks before the first heading, sections."""

    title: str
    opening: list[Block] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)


def to_html(document: Document) -> str:
    """Write a document as one page that needs no other file and no network."""
    parts = [f"<h1>{html.escape(document.title)}</h1>", *map(_html_block, document.opening)]
    links = [f'<a href="#s{i}">{html.escape(s.title)}</a>' for i, s in _numbered(document)]
    parts.append(f"<nav>{' '.join(links)}</nav>")
    for number, section in _numbered(document):
        blocks = "\n".join(map(_html_block, section.blocks))
        parts.append(
            f'<section id="s{number}"><h2>{html.escape(section.title)}</h2>\n{blocks}</section>'
        )
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(document.title)}</title>\n<style>{CSS}</style></head>\n"
        f"<body><main>\n{body}\n</main><script>{SCRIPT}</script></body></html>\n"
    )


def to_markdown(document: Document) -> str:
    """Write a document as Markdown; its pictures are files beside it."""
    parts = [f"# {_plain(document.title)}", *map(_markdown_block, document.opening)]
    for section in document.sections:
        parts += [f"## {_plain(section.title)}", *map(_markdown_block, section.blocks)]
    return "\n\n".join(parts) + "\n"


def _numbered(document: Document) -> list[tuple[int, Section]]:
    return list(enumerate(document.sections, 1))


def _html_block(block: Block) -> str:
    match block:
        case Text(text, kind):
            return f'<p class="{kind}">{_inline(text)}</p>' if kind else f"<p>{_inline(text)}</p>"
        case Tiles(tiles):
            return f'<div class="tiles">{"".join(map(_html_tile, tiles))}</div>'
        case Table():
            return _html_table(block)
        case Picture(content, _, caption):
            return (
                f'<figure><img src="{_data(content)}" alt="{html.escape(caption)}">'
                f"<figcaption>{_inline(caption)}</figcaption></figure>"
            )
        case Commands(lines):
            return f"<pre>{html.escape(chr(10).join(lines))}</pre>"
        case Folded(title, blocks):
            inside = "\n".join(map(_html_block, blocks))
            return f"<details><summary>{html.escape(title)}</summary>\n{inside}</details>"


def _html_tile(tile: Tile) -> str:
    return (
        f"<div><span>{html.escape(tile.label)}</span><b>{html.escape(tile.value)}</b>"
        f"<span>{html.escape(tile.beside)}</span></div>"
    )


def _html_table(table: Table) -> str:
    rows = []
    if table.groups:
        spans = (f'<th colspan="{n}">{_inline(name)}</th>' for name, n in table.groups)
        rows.append(f'<tr class="groups">{"".join(spans)}</tr>')
    rows.append(f"<tr>{''.join(f'<th>{_inline(name)}</th>' for name in table.head)}</tr>")
    body = []
    for line in table.lines:
        if len(line.cells) == 1:
            text = _inline(_words(line.cells[0]))
            cells = f'<td colspan="{len(table.head)}">{text}</td>'
        else:
            first, *rest = line.cells
            cells = f'<th scope="row">{_html_words(_words(first))}</th>'
            cells += "".join(map(_html_cell, rest))
        body.append(f'<tr class="{line.kind}">{cells}</tr>' if line.kind else f"<tr>{cells}</tr>")
    kinds = [k for k, on in (("numbers", table.numbers), ("sortable", table.sortable)) if on]
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    return (
        f'<div class="wide"><table{kind}><thead>{"".join(rows)}</thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _html_cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return f"<td>{_html_words(cell)}</td>"
    why = html.escape(cell.why)
    return f'<td class="{cell.kind}" title="{why}">{_html_words(cell.text)}</td>'


def _html_words(text: str) -> str:
    """Write a cell's text; what stands under its first line is small."""
    first, *rest = text.split("\n")
    return _inline(first) + "".join(f"<br><small>{_inline(line)}</small>" for line in rest)


def _words(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell.text


def _inline(text: str) -> str:
    return _TICKS.sub(r"<code>\1</code>", html.escape(text))


def _data(content: str | bytes) -> str:
    kind = "svg+xml" if isinstance(content, str) else "png"
    raw = content.encode() if isinstance(content, str) else content
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def _markdown_block(block: Block) -> str:
    match block:
        case Text(text, kind):
            return f"> {_plain(text)}" if kind in ("note", "hole") else _plain(text)
        case Tiles(tiles):
            lines = [f"- {t.label}: **{t.value}** ({t.beside})" for t in tiles]
            return "\n".join(map(_plain, lines))
        case Table():
            return _markdown_table(block)
        case Picture(_, path, caption):
            return f"![{_plain(caption)}](<{path}>)\n\n{_plain(caption)}"
        case Commands(lines):
            return "\n".join(["```", *lines, "```"])
        case Folded(title, blocks):
            return "\n\n".join([f"**{_plain(title)}**", *map(_markdown_block, blocks)])


def _markdown_table(table: Table) -> str:
    above = [name for name, count in table.groups for _ in range(count)] or [""] * len(table.head)
    head = [" ".join(filter(None, pair)) for pair in zip(above, table.head, strict=True)]
    rule = ["---", *(["---:" if table.numbers else "---"] * (len(head) - 1))]
    lines = [[*line.cells, *[""] * (len(head) - len(line.cells))] for line in table.lines]
    shown: list[Sequence[Cell]] = [head, rule, *lines]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in shown)


def _cell(cell: Cell) -> str:
    why = f" ({cell.why})" if isinstance(cell, Mark) and cell.kind == "reduced" else ""
    return _plain(_words(cell) + why).replace("\n", " ").replace("|", "\\|")


def _plain(text: str) -> str:
    """Keep names that look like HTML names in Markdown too, except inside code."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(p if p.startswith("`") else p.replace("<", "&lt;") for p in parts)


CSS = """
:root { --ink:#1b1f24; --soft:#5b6570; --line:#d9dee3; --page:#fff; --panel:#f5f7f9;
  --blue:#0072B2; --warn:#8a4b00; --warnbg:#fff4e2;
  --below:#b54708; --chosen:#0072b21f; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink:#e6e9ec; --soft:#9aa5b1; --line:#39424c;
  --page:#14181c; --panel:#1d2329; --blue:#6db8e6; --warn:#ffc477; --warnbg:#33270f;
  --below:#ff9d5c; --chosen:#6db8e62e; } }
* { box-sizing: border-box; }
body { margin:0; background:var(--page); color:var(--ink);
  font:16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width:1140px; margin:0 auto; padding:32px 24px 64px; }
h1 { font-size:30px; line-height:1.2; margin:0 0 12px; overflow-wrap:anywhere; }
h2 { font-size:21px; margin:44px 0 10px; padding-top:14px; border-top:1px solid var(--line); }
p { margin:10px 0; max-width:86ch; overflow-wrap:anywhere; }
p.lede { font-size:18px; } p.note { color:var(--soft); font-size:14.5px; }
p.hole { background:var(--warnbg); color:var(--warn); border-left:4px solid currentColor;
  padding:8px 12px; }
nav { margin:20px 0 0; font-size:14.5px; } nav a { color:var(--blue); margin-right:16px; }
.tiles { display:grid; grid-template-columns:repeat(auto-fill,minmax(210px,1fr)); gap:14px;
  margin:22px 0; }
.tiles div { background:var(--panel); border:1px solid var(--line); border-radius:8px;
  padding:12px 16px; }
.tiles span { display:block; color:var(--soft); font-size:14px; }
.tiles b { display:block; font-size:28px; line-height:1.35; font-variant-numeric:tabular-nums; }
.wide { overflow-x:auto; margin:14px 0; }
table { border-collapse:collapse; font-size:14.5px; min-width:100%; }
th, td { padding:6px 10px; text-align:left; vertical-align:top;
  border-bottom:1px solid var(--line); }
td { overflow-wrap:anywhere; } tbody th { font-weight:500; }
thead th { font-size:13px; color:var(--soft); font-weight:600; vertical-align:bottom; }
tr.groups th { text-align:center; color:var(--ink); border-bottom:2px solid var(--ink);
  border-left:10px solid var(--page); } tr.groups th:first-child { border-bottom:0; }
table.numbers td { white-space:nowrap; font-variant-numeric:tabular-nums; }
table.numbers td, table.numbers thead tr:not(.groups) th:not(:first-child) { text-align:right; }
table.numbers th[scope=row] { min-width:178px; }
table.numbers th, table.numbers td { padding:5px 7px; }
table:not(.numbers) th[scope=row] { min-width:150px; width:210px; }
table:not(.numbers) td { min-width:120px; }
table small { color:var(--soft); font-weight:400; }
td.near small { color:var(--soft); } td.above small { color:var(--blue); font-weight:600; }
td.below small { color:var(--below); font-weight:600; } td.reduced small { color:var(--warn); }
td.reduced { background:var(--warnbg); } td[title] { cursor:help; }
tr.strong > *, tr.sum > * { font-weight:700; } tr.sum > * { border-top:2px solid var(--line); }
table.sortable thead tr:last-child th { cursor:pointer; }
table.sortable thead th[aria-sort=ascending]::after { content:" \\25B2"; }
table.sortable thead th[aria-sort=descending]::after { content:" \\25BC"; }
.tools { display:flex; flex-wrap:wrap; gap:8px 16px; align-items:center; font-size:14px;
  color:var(--soft); margin:14px 0 -6px; }
.tools input[type=search] { font:inherit; color:inherit; background:var(--panel); padding:4px 8px;
  border:1px solid var(--line); border-radius:6px; min-width:min(240px,100%); }
tbody tr.chosen > * { background:var(--panel); box-shadow:inset 0 0 0 9999px var(--chosen); }
tr.compared > * { font-weight:700; border-top:2px solid var(--blue); }
tr.grey > * { color:var(--soft); font-size:13px; }
table.numbers tr.rule td { text-align:left; color:var(--soft); font-size:13px; white-space:normal;
  padding-top:18px; border-bottom:2px solid var(--line); }
figure { margin:16px 0; } figure img { max-width:100%; height:auto; background:#fff; padding:8px;
  border:1px solid var(--line); border-radius:8px; }
figcaption { color:var(--soft); font-size:14px; max-width:86ch; }
pre { background:var(--panel); border:1px solid var(--line); border-radius:8px; padding:12px 16px;
  overflow-x:auto; font-size:13.5px; line-height:1.6; }
details { margin:14px 0; } summary { cursor:pointer; color:var(--blue); font-size:14.5px; }
code { font-size:.88em; background:var(--panel); padding:1px 4px; border-radius:4px; }
td code { background:none; padding:0; }
@media (max-width:600px) { main { padding:20px 16px 40px; } h1 { font-size:24px; }
  table.numbers th[scope=row] { min-width:120px; }
  table:not(.numbers) th[scope=row] { min-width:110px; width:110px; } }
@media print { nav, .tools { display:none; } main { max-width:none; padding:0; }
  pre { white-space:pre-wrap; }
  section { break-inside:avoid-page; } .wide { overflow:visible; } }
"""

# Sorting, filtering and comparing happen inside the page; it reads text and writes text only.
SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], head = table.tHead.rows[table.tHead.rows.length - 1];
  const ours = Array.from(body.rows).filter(r => r.className === "" || r.className === "strong");
  const rest = Array.from(body.rows).filter(r => !ours.includes(r));
  if (ours.length < 2) continue;
  const value = (row, column) => {
    const cell = row.cells[column];
    const text = cell.firstChild ? cell.firstChild.textContent.trim() : "";
    const number = parseFloat(text);
    return column > 0 && !Number.isNaN(number) ? number : text;
  };
  const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b
    : typeof a === "number" ? 1 : typeof b === "number" ? -1 : a.localeCompare(b);
  Array.from(head.cells).forEach((cell, column) => {
    cell.tabIndex = 0;
    const sort = () => {
      const down = cell.getAttribute("aria-sort") !== "descending";
      for (const other of head.cells) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      ours.sort((a, b) => (down ? -1 : 1) * compare(value(a, column), value(b, column)));
      body.append(...ours, ...rest);
    };
    cell.addEventListener("click", sort);
    cell.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
  const tools = document.createElement("div");
  tools.className = "tools";
  const find = document.createElement("input");
  find.type = "search";
  find.placeholder = "filter rows";
  find.setAttribute("aria-label", "filter rows");
  find.addEventListener("input", () => {
    const word = find.value.toLowerCase();
    for (const row of ours) row.hidden = !row.textContent.toLowerCase().includes(word);
  });
  tools.append(find);
  if (table.classList.contains("numbers")) {
    const hint = document.createElement("span");
    hint.textContent = "click two rows to compare them";
    tools.append(hint);
    const chosen = [];
    const result = body.insertRow();
    result.className = "compared";
    result.hidden = true;
    rest.unshift(result);
    body.append(...ours, ...rest);
    const show = () => {
      result.replaceChildren();
      result.hidden = chosen.length < 2;
      if (result.hidden) return;
      const [a, b] = chosen;
      Array.from(a.cells).forEach((cell, column) => {
        const out = document.createElement(column ? "td" : "th");
        const [x, y] = [value(a, column), value(b, column)];
        out.textContent = column === 0 ? x + " minus " + y
          : typeof x === "number" && typeof y === "number"
            ? (x - y >= 0 ? "+" : "") + (x - y).toFixed(1) : "\u2013";
        result.append(out);
      });
    };
    for (const row of ours) {
      row.addEventListener("click", () => {
        if (chosen.includes(row)) chosen.splice(chosen.indexOf(row), 1);
        else chosen.push(row);
        while (chosen.length > 2) chosen.shift();
        for (const other of ours) other.classList.toggle("chosen", chosen.includes(other));
        show();
      });
    }
  }
  table.parentElement.before(tools);
}
"""
