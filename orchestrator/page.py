"""What the pages share: their look, and plots as SVG text that takes its colours from the page.

In: a room's template and its values. Out: one self-contained HTML text that opens from the disk, with no script and no
network. Everything that comes from the user's data is escaped.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from cycler import cycler
from jinja2 import Environment, FileSystemLoader
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

_WIDE = 50
"""From here on the powers of ten are enough to read a logarithmic axis by."""

INK, FAINT, CARD = "#010203", "#040506", "#070809"
"""Stand-ins in matplotlib's output for the page's own colours, which follow light and dark mode."""
COLORS = ("#3b6fd4", "#d9663b", "#2f9e6e", "#a457c7", "#c79a1e", "#d1477a", "#3aa3b5", "#7a6a58", "#6c78e0", "#8aa32f")
_STYLE = {
    "svg.hashsalt": "report", "text.parse_math": False, "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT, "axes.labelcolor": INK,
    "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.grid": True, "grid.color": FAINT,
    "grid.alpha": 0.25, "legend.frameon": False, "axes.prop_cycle": None,
}  # fmt: skip


def render(template: Path, values: Mapping[str, Any], filters: Mapping[str, Callable[..., Any]]) -> str:
    """A template that extends ``page.html``."""
    folders = [template.parent, Path(__file__).parent]
    environment = Environment(loader=FileSystemLoader(folders), autoescape=True, trim_blocks=True)
    environment.filters |= filters
    return environment.get_template(template.name).render(**values)


@contextlib.contextmanager
def figure(width: float = 3.6, height: float = 3.0) -> Iterator[tuple[Figure, Axes]]:
    """A figure in the report's style; never through pyplot, which keeps global state."""
    with mpl.rc_context({**_STYLE, "axes.prop_cycle": cycler(color=COLORS)}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser draws the letters, with its own fonts
        drawn = Figure((width, height), layout="constrained")
        yield drawn, drawn.add_subplot()


def svg(figure: Figure) -> str:
    """One ``<svg>``. Labels in it were escaped by matplotlib's own XML writer."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = (
        text[text.index("<svg") :]
        .replace(INK, "var(--ink)")
        .replace(FAINT, "var(--faint)")
        .replace(CARD, "var(--card)")
    )
    text = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"|(<svg [^>]*?)height="[^"]*"', r"\1\2", text, count=1)
    prefix = f"p{zlib.crc32(text.encode()):x}-"  # ids must not collide with those of the page's other plots
    return re.sub(r'(id="|xlink:href="#|url\(#)', lambda match: match.group(1) + prefix, text)


def log_axis(axes: Axes) -> None:
    """A logarithmic x axis that can be read also where what is drawn by now spans less than a decade."""
    axes.set_xscale("log")
    low, high = axes.dataLim.intervalx
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < _WIDE * low else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def short(name: str) -> str:
    """A label for a plot."""
    return name if len(name) <= 16 else name[:15] + "…"
