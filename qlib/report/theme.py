"""The look of every figure: one colour and one marker per family, and how both turn into CSS variables."""

import re

__all__ = ["INK", "SOFT", "LINE", "PAPER", "MARKS", "family_mark", "style", "themed"]

# What matplotlib draws with; `themed` replaces each by a CSS variable with this very colour as fallback, so that a
# figure looks right in a plain notebook and follows the page's light or dark colours in the report.
INK, SOFT, LINE, PAPER = "#1b1f24", "#5c6570", "#d5dae0", "#fefefe"

#: family -> colour (Okabe and Ito 2008, safe for colour-blind readers), marker, CSS variable.
MARKS = {
    "baseline": (INK, "*", "ink"),
    "pruning": ("#d55e00", "v", "red"),
    "weight_quantization": ("#0072b2", "o", "blue"),
    "mixed_precision": ("#009e73", "D", "green"),
    "finetuning": ("#b3589a", "^", "purple"),
    "combined": ("#c98500", "s", "orange"),
    "tool": ("#3d9fd6", "P", "sky"),
    "training": ("#8a6d3b", "h", "brown"),
}
OTHER = ("#767d86", "X", "grey")

WIDTH, HEIGHT, POINTS = 4.5, 3.3, 11  # inches and points: letters of about 11 pixels on a phone 360 pixels wide


def family_mark(family: str) -> tuple[str, str]:
    """Colour and marker of a family; families that nobody foresaw share a grey cross."""
    color, marker, _ = MARKS.get(family, OTHER)
    return color, marker


def style() -> dict:
    """The matplotlib settings of all figures, for ``matplotlib.rc_context``."""
    return {
        "figure.figsize": (WIDTH, HEIGHT),
        "figure.facecolor": PAPER,
        "figure.constrained_layout.use": True,
        "axes.facecolor": PAPER,
        "axes.edgecolor": SOFT,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": LINE,
        "grid.linewidth": 0.8,
        "text.color": INK,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "font.size": POINTS,
        "axes.labelsize": POINTS,
        "xtick.labelsize": POINTS - 1,
        "ytick.labelsize": POINTS - 1,
        "legend.fontsize": POINTS - 1,
        "legend.frameon": False,
        "svg.fonttype": "none",
    }


def themed(svg: str) -> str:
    """Replace the palette in an SVG text by CSS variables, each with its colour as fallback."""
    names = {INK: "ink", SOFT: "soft", LINE: "line", PAPER: "paper", "#000000": "ink", "#ffffff": "paper"}
    names |= {color: name for color, _, name in (*MARKS.values(), OTHER)}
    fallback = {"#000000": INK, "#ffffff": PAPER}
    pattern = re.compile("|".join(map(re.escape, names)), re.IGNORECASE)

    def variable(match: re.Match) -> str:
        color = match[0].lower()
        return f"var(--{names[color]}, {fallback.get(color, color)})"

    return pattern.sub(variable, svg)
