"""Displays figures, tables and sections of a report in a notebook. Needs IPython."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

from unipool_jax.analysis.figures import Draw, png
from unipool_jax.analysis.page import Part, Table, table_html

WIDTH = 860
"""Display width of a figure in pixels; the image has a higher resolution."""


def quiet() -> None:
    """Silence Orbax's log of opened checkpoints, and Rich's warning that progress bars need widgets."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", 'install "ipywidgets"')


def show(draw: Draw) -> None:
    """Display the figure that `draw` returns, in the light theme."""
    from IPython.display import Image, display

    display(Image(png(draw), width=WIDTH))


def show_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Display a table of text cells."""
    from IPython.display import HTML, display

    table = Table(head, [[str(cell) for cell in row] for row in rows])
    display(HTML(table_html(table)))


def show_part(part: Part) -> None:
    """Display a section of a report: its paragraphs, figure and table."""
    from IPython.display import Markdown, display

    display(Markdown("\n\n".join([f"**{part.title}**", *part.words])))
    if part.figure is not None:
        show(part.figure[1])
    if part.table is not None:
        show_table(part.table.head, part.table.rows)
