"""How the pictures of the site are drawn and stored: SVG, once for the light and once for the dark scheme.

A script in this folder computes its pictures with gsa_ref and calls `main`. Beside them it stores the figures that its
page quotes, in `<script>.json`. `python docs/figures/<script>.py` writes them again; `--out` writes them elsewhere.
"""

import argparse
import codecs
import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

# Colour-blind safe (Okabe and Ito), legible on both backgrounds.
BLUE, ORANGE, GREEN = "#3a8fd0", "#e08a00", "#1a9c77"
INK = {"light": "#30343c", "dark": "#d4d7dd"}
SHARED = {
    # Text stays text: small files that browsers can search; ids from the salt, so that a rerun gives the same file.
    "svg.fonttype": "none",
    "svg.hashsalt": "gsa",
    "font.family": "sans-serif",
    "font.size": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
COLOURED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")

Draw = Callable[[], Figure]


def zen() -> list[str]:
    """The words of the Zen of Python, a real text that every reader has (`import this`), without its title."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    text = codecs.decode(this.s, "rot13").split("\n", 1)[1]
    return re.findall(r"[a-z']+", text.lower())


def word_vectors(words: list[str], width: int, seed: int) -> np.ndarray:
    """One random vector per distinct word, [len(words), width], entries of variance 1/width: |e|² is about 1."""
    distinct = list(dict.fromkeys(words))
    table = np.random.default_rng(seed).standard_normal((len(distinct), width)) / np.sqrt(width)
    return table[[distinct.index(w) for w in words]]


def main(stem: str, pictures: dict[str, Draw], facts: dict[str, object]) -> None:
    """Write `<stem>_<picture>.<scheme>.svg` for every picture and scheme, and the facts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out = parser.parse_args().out
    for scheme, ink in INK.items():
        with mpl.rc_context(SHARED | dict.fromkeys(COLOURED, ink)):
            for name, draw in pictures.items():
                path = out / f"{stem}_{name}.{scheme}.svg"
                draw().savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
                lines = path.read_text(encoding="utf-8").splitlines()
                path.write_text("".join(line.rstrip() + "\n" for line in lines), encoding="utf-8")  # no blank at an end
    (out / f"{stem}.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
