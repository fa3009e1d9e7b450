"""Showing figures, tables and sections of a report in a notebook; needs IPython, which every notebook has."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

from unipool_jax.analysis.figures import Draw, png
from unipool_jax.analysis.page import Part, Table, table_html

WIDTH = 860
"""Of a figure on the screen, in pixels; the file has more, for screens that show more."""


def quiet() -> None:
    """Leave out what libraries say about themselves: how Orbax opens a checkpoint, and that progress bars of Rich need
    widgets."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", 'install "ipywidgets"')


def show(draw: Draw) -> None:
    """Show the figure that `draw` makes, in the light theme."""
    from IPython.display import Image, display

    display(Image(png(draw), width=WIDTH))


def show_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Show a table; cells are shown as text, so numbers come formatted."""
    from IPython.display import HTML, display

    table = Table(head, [[str(cell) for cell in row] for row in rows])
    display(HTML(table_html(table)))


def show_part(part: Part) -> None:
    """Show a section of a report: its words, its figure and its table."""
    from IPython.display import Markdown, display

    display(Markdown("\n\n".join([f"**{part.title}**", *part.words])))
    if part.figure is not None:
        show(part.figure[1])
    if part.table is not None:
        show_table(part.table.head, part.table.rows)
