"""A self-contained HTML page, without scripts, other files or network; follows the system's light or dark theme."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from unipool_jax.analysis.figures import Draw, data_uri, png
from unipool_jax.config.files import write_atomically, write_text

_STYLE = """
:root { color-scheme: light dark;
  --paper: #ffffff; --ink: #1a1a1a; --quiet: #5c6370; --line: #d9d9d9; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181c; --ink: #e6e6e6; --quiet: #a0a7b4; --line: #3a3f47; --card: #1f2329; }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .4rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
p { margin: .5rem 0; } .quiet, figcaption { color: var(--quiet); font-size: .9rem; }
figure { margin: 1rem 0; } img { display: block; width: 100%; height: auto; }
.wide { width: fit-content; max-width: calc(100vw - 2.5rem); overflow-x: auto;
  position: relative; left: 50%; transform: translateX(-50%); }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: right; }
td { white-space: nowrap; } td:first-child { white-space: normal; min-width: 9rem; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom-width: 2px; vertical-align: bottom; }
ul.facts { list-style: none; padding: 0; margin: 1.2rem 0; display: grid; gap: .7rem;
  grid-template-columns: repeat(auto-fit, minmax(9.2rem, 1fr)); }
ul.facts li { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
ul.facts b { display: block; font-size: 1.3rem; font-weight: 600; }
ul.facts span { color: var(--quiet); font-size: .88rem; }
code { font-size: .9em; overflow-wrap: anywhere; }
"""


class Table(NamedTuple):
    """A table of text."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Part(NamedTuple):
    """A section of a page."""

    title: str
    words: Sequence[str]
    """Paragraphs that explain the figure."""
    figure: tuple[str, Draw] | None = None
    """Name of the figure's file, without suffix, and the function that draws it."""
    alt: str = ""
    """Alternative text of the figure."""
    table: Table | None = None


def write_page(
    folder: Path, title: str, subtitle: str, facts: Mapping[str, str], parts: Sequence[Part], command: str
) -> Path:
    """Write each figure as `NAME.png` (light theme) and the page, with embedded figures, as `report.html`.

    Args:
      folder: created if it does not exist.
      title: heading.
      subtitle: what the page is about.
      facts: numbers at the top, by label.
      parts: sections.
      command: the command that recreates the page.

    Returns:
      The path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tiles = "".join(f"<li><b>{_text(value)}</b><span>{_text(name)}</span></li>" for name, value in facts.items())
    body = [f"<h1>{_text(title)}</h1>", f'<p class="quiet">{_text(subtitle)}</p>', f'<ul class="facts">{tiles}</ul>']
    for part in parts:
        body.append(f"<section><h2>{_text(part.title)}</h2>")
        body += [f"<p>{_text(paragraph)}</p>" for paragraph in part.words]
        if part.figure is not None:
            name, draw = part.figure
            light = png(draw)
            write_atomically(folder / f"{name}.png", light)
            body.append(
                '<figure><picture><source media="(prefers-color-scheme: dark)" '
                f'srcset="{data_uri(png(draw, dark=True))}">'
                f'<img src="{data_uri(light)}" alt="{_text(part.alt)}"></picture></figure>'
            )
        if part.table is not None:
            body.append(table_html(part.table))
        body.append("</section>")
    body.append(f'<p class="quiet">Made with <code>{_text(command)}</code></p>')
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def table_html(table: Table) -> str:
    """A table as HTML, its text escaped."""
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in table.head)
    rows = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _text(text: str) -> str:
    return html.escape(text, quote=True)
