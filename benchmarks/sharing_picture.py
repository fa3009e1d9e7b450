"""The picture of docs/sharing.md: what each layer sees in every design, drawn from their configurations.

python -m benchmarks.sharing_picture    # writes docs/assets/sharing.png
"""

from functools import partial
from pathlib import Path

from unipool_jax.analysis.figures import png
from unipool_jax.analysis.windows_figure import windows_figure
from unipool_jax.config.compose import compose_config
from unipool_jax.config.files import write_atomically

PICTURE = Path(__file__).parent.parent / "docs" / "assets" / "sharing.png"

DESIGNS = {
    "vanilla": "method=vanilla",
    "pool.groups=3": "method=unipool pool.groups=3",
    "unipool": "method=unipool",
    "tied_inner, bank_runs (runs)": "method=tied_inner",
    "tied_inner, wide (wide_runs)": "method=tied_inner pool.starts=wide_runs",
    "cyclic": "method=cyclic",
    "rexmoe (wide_runs, opening)": "method=rexmoe",
    "sliding": "method=sliding",
    "ring": "method=ring",
}
"""Settings of each design, at twelve layers and eight experts a layer."""


def main() -> None:
    """Draw and write the picture."""
    designs = {name: compose_config(["scale=182m", "mode=describe", *words.split()]) for name, words in DESIGNS.items()}
    write_atomically(PICTURE, png(partial(windows_figure, designs)))
    print(PICTURE)


if __name__ == "__main__":
    main()
