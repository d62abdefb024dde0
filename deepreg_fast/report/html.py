"""HTML pages, built section by section; all text is escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ..files import write_atomically
from . import theme

_STYLE = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 80rem; padding: 1.5rem 1.25rem 4rem; color: var(--ink); background: var(--page);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .5rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
p { margin: .5rem 0; max-width: 50rem; }
a { color: var(--accent); }
nav { font-size: .9rem; margin: .8rem 0 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; }
.lead, figcaption { color: var(--soft); }
figure { margin: 1rem 0; min-width: 0; }
figure svg, figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: .9rem; margin-top: .3rem; max-width: 50rem; }
.scroll, .chart, .pictures { overflow-x: auto; }
.chart svg { min-width: 34rem; } .pictures svg { min-width: 44rem; }
.panels { display: grid; gap: .4rem 1.6rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21.5rem), 1fr)); }
.panels figure { max-width: 34rem; }
.grid { display: grid; gap: .9rem .7rem; grid-template-columns: repeat(auto-fill, minmax(min(46%, 11.5rem), 1fr));
  margin: .8rem 0; }
.grid figure { margin: 0; } .grid .pair { grid-column: span 2; }
.pair div { display: grid; grid-template-columns: 1fr 1fr; gap: .7rem; }
.grid figcaption { font-size: .82rem; line-height: 1.35; }
.grid figcaption b { display: block; color: var(--ink); font-weight: 600; }
.four { grid-template-columns: repeat(4, 1fr); max-width: 62rem; }
.five { grid-template-columns: repeat(5, 1fr); max-width: 70rem; }
.small { grid-template-columns: repeat(auto-fill, minmax(3.6rem, 1fr)); max-width: 40rem; }
.sharp img { image-rendering: pixelated; }
.bar { max-width: 20rem; } .bar img { height: .8rem; }
.bar span { display: flex; justify-content: space-between; font-size: .82rem; color: var(--soft); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; line-height: 1.4; }
.scroll { margin: .8rem 0; }
th, td { text-align: right; padding: .33rem .5rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th.text, td.text { text-align: left; }
td.long { white-space: normal; min-width: 14rem; }
td.medium { white-space: normal; min-width: 7.5rem; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page);
  padding-left: 0; }
td:first-child { white-space: normal; min-width: 8rem; max-width: 19rem; }
thead th { color: var(--soft); font-weight: 600; }
tr.best td { background: var(--tint); }
tr.part td { color: var(--soft); font-weight: 600; padding-top: 1rem; white-space: nowrap; }
summary { cursor: pointer; color: var(--accent); }
pre { overflow-x: auto; font-size: .85rem; }
@media (max-width: 40rem) {
  body { padding: 1rem 1rem 3rem; } h1 { font-size: 1.4rem; }
  .four, .five { grid-template-columns: repeat(2, 1fr); }
  td:first-child { min-width: 6.5rem; max-width: 8.5rem; } }
"""
_NUMBER = re.compile(r"–?|[+−-]?\d[^a-z]*( (of \d+|s|min|h|×|dB))?")


@dataclass(frozen=True)
class Panel:
    """A figure: the `<svg>` element, its caption, and the alternative text for screen readers."""

    svg: str
    caption: str
    alt: str


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, its alternative text, and a bold and a plain line below it."""

    uri: str
    alt: str
    title: str = ""
    caption: str = ""
    beside: tuple[str, str] = ("", "")
    """Another image to its right with the same caption: data URI and alternative text."""


class Report:
    """A page with sections in the order in which they are added; `write(path)` replaces the file atomically."""

    def __init__(self, title: str, lead: str) -> None:
        self.title = title
        self._lead = lead
        self._sections: list[str] = []
        self._parts: list[str] = []

    def section(self, title: str, text: str = "") -> None:
        """Start a section, which is listed at the top of the page."""
        self._sections.append(title)
        self._parts.append(f'<h2 id="section-{len(self._sections)}">{escape(title)}</h2>')
        self.text(text)

    def subsection(self, title: str, text: str = "") -> None:
        """Start a subsection."""
        self._parts.append(f"<h3>{escape(title)}</h3>")
        self.text(text)

    def text(self, text: str) -> None:
        """Add a paragraph; nothing if the text is empty."""
        if text:
            self._parts.append(f"<p>{escape(text)}</p>")

    def figure(self, svg: str, caption: str, wide: bool = False, alt: str = "") -> None:
        """Add a figure, an `<svg>` element. On a narrow screen it scrolls instead of becoming unreadable.

        `alt` is the alternative text for screen readers; by default the caption.
        """
        self._parts.append(_figure(svg, caption, alt or caption, "pictures" if wide else "chart"))

    def panels(self, panels: Sequence[Panel]) -> None:
        """Add small figures, side by side if there is room and stacked on a phone."""
        body = "".join(_figure(p.svg, p.caption, p.alt, "panel") for p in panels)
        self._parts.append(f'<div class="panels">{body}</div>' if panels else "")

    def pictures(self, pictures: Sequence[Picture], kind: str = "", sharp: bool = False) -> None:
        """Add images in a grid. `kind` "four" or "five" makes so many columns (two on a phone), "small" many. `sharp`
        disables interpolation."""
        cells = []
        for p in pictures:
            images = _image(p.uri, p.alt) + (_image(*p.beside) if p.beside[0] else "")
            cells.append(
                f"<figure{' class=pair' if p.beside[0] else ''}><div>{images}</div>"
                f"<figcaption><b>{escape(p.title)}</b>{escape(p.caption)}</figcaption></figure>"
            )
        names = " ".join(filter(None, ("grid", kind, "sharp" if sharp else "")))
        self._parts.append(f'<div class="{names}">{"".join(cells)}</div>')

    def scale(self, picture: Picture, marks: Sequence[str]) -> None:
        """Add a color bar with evenly spaced marks below it."""
        spans = "".join(f"<i>{escape(m)}</i>" for m in marks)
        self._parts.append(
            f'<figure class="bar">{_image(picture.uri, picture.alt)}'
            f"<span>{spans}</span><figcaption>{escape(picture.caption)}</figcaption></figure>"
        )

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str] | str], best: int | None = None) -> None:
        """Add a table. Row `best` is highlighted; a row that is one string is a heading for the rows below it.

        Columns of numbers are right-aligned, others left-aligned.
        """
        full_rows = [r for r in rows if not isinstance(r, str)]
        classes = [_column([r[i] for r in full_rows]) for i in range(len(head))]
        lines = ['<div class="scroll" tabindex="0"><table><thead><tr>']
        lines += [f'<th scope="col" {c}>{escape(h)}</th>' for h, c in zip(head, classes, strict=True)]
        lines.append("</tr></thead><tbody>")
        for k, row in enumerate(rows):
            if isinstance(row, str):
                lines.append(f'<tr class="part"><td colspan="{len(head)}">{escape(row)}</td></tr>')
                continue
            lines.append('<tr class="best">' if k == best else "<tr>")
            lines += [f"<td {c}>{escape(v)}</td>" for v, c in zip(row, classes, strict=True)]
            lines.append("</tr>")
        lines.append("</tbody></table></div>")
        self._parts.append("".join(lines))

    def details(self, title: str, text: str) -> None:
        """Add a collapsible text in a fixed-width font."""
        self._parts.append(f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>")

    def html(self) -> str:
        """The HTML of the page."""
        links = "".join(
            f'<a href="#section-{i}">{escape(title)}</a>' for i, title in enumerate(self._sections, start=1)
        )
        head = (
            '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{theme.css()}{_STYLE}</style>"
        )
        top = f'<h1>{escape(self.title)}</h1>\n<p class="lead">{escape(self._lead)}</p>\n<nav>{links}</nav>'
        body = "\n".join([top, *self._parts])
        return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'

    def write(self, path: Path) -> None:
        """Write the page."""
        write_atomically(path, self.html().encode(errors="backslashreplace"))


def _figure(svg: str, caption: str, alt: str, kind: str) -> str:
    svg = theme.themed(svg).replace("<svg ", f'<svg role="img" aria-label="{escape(alt, quote=True)}" ', 1)
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><div class="{kind}">{svg}</div>{below}</figure>'


def _image(uri: str, alt: str) -> str:
    return f'<img src="{uri}" alt="{escape(alt, quote=True)}">'


def _column(cells: Sequence[str]) -> str:
    if all(_NUMBER.fullmatch(c) for c in cells):
        return ""
    longest = max(map(len, cells), default=0)
    return 'class="text long"' if longest > 40 else 'class="text medium"' if longest > 20 else 'class="text"'
