"""An HTML page built section by section; every text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..files import write_atomically

_STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #5b6876; --line: #dde3ea; --accent: #1f6feb; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1.25rem 4rem; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
p { margin: .4rem 0; max-width: 46rem; }
.lead, figcaption, .note { color: var(--soft); }
figure { margin: 1rem 0; }
figure svg, figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: .9rem; margin-top: .3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; font-size: .95rem; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.text, th.text { text-align: left; white-space: normal; min-width: 14rem; }
thead th { color: var(--soft); font-weight: 600; }
tr.best td { background: #eef5ff; }
.chart, .pictures { overflow-x: auto; }
.chart svg { min-width: 34rem; } .pictures svg { min-width: 44rem; }
"""


class Report:
    """Sections in the order in which they are added; `write(path)` replaces the file in one step."""

    def __init__(self, title: str, lead: str) -> None:
        self.title = title
        self._parts = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(lead)}</p>']

    def section(self, title: str, text: str = "") -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{escape(title)}</h2>")
        if text:
            self._parts.append(f"<p>{escape(text)}</p>")

    def figure(self, svg: str, caption: str, wide: bool = False) -> None:
        """Add a figure, an `<svg>` element; on a narrow screen it scrolls instead of becoming unreadable."""
        kind = "pictures" if wide else "chart"
        # A screen reader says the caption instead of walking through the paths.
        svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(caption, quote=True)}" ', 1)
        caption_html = f"<figcaption>{escape(caption)}</figcaption>"
        self._parts.append(f'<figure><div class="{kind}">{svg}</div>{caption_html}</figure>')

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], best: int | None = None) -> None:
        """Add a table; row `best` is tinted, columns with long cells are set as text."""
        text = [max((len(r[i]) for r in rows), default=0) > 40 for i in range(len(head))]
        cls = ['class="text"' if t else "" for t in text]
        lines = ['<div class="scroll"><table><thead><tr>']
        lines += [f"<th {c}>{escape(h)}</th>" for h, c in zip(head, cls, strict=True)]
        lines.append("</tr></thead><tbody>")
        for k, row in enumerate(rows):
            lines.append('<tr class="best">' if k == best else "<tr>")
            lines += [f"<td {c}>{escape(v)}</td>" for v, c in zip(row, cls, strict=True)]
            lines.append("</tr>")
        lines.append("</tbody></table></div>")
        self._parts.append("".join(lines))

    def html(self) -> str:
        """The page."""
        body = "\n".join(self._parts)
        head = (
            '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{_STYLE}</style>"
        )
        return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'

    def write(self, path: Path) -> None:
        """Write the page."""
        write_atomically(path, self.html().encode())
