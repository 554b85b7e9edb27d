"""Colors: one table for figures and pages, readable by color-blind readers and in gray.

Rendering: a template with its style and script in one HTML file.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

# Blue, white, orange: the two ends differ in hue for every kind of color vision.
DIVERGING = ((0, 69, 134), (86, 140, 190), (247, 247, 247), (236, 152, 60), (166, 80, 0))
# Okabe and Ito 2008; category 0 is left as the photograph is.
CATEGORIES = ("#00000000", "#0072b2", "#d55e00", "#f0e442", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
HATCHES = ("", "", "///", "...", "xxx", "---", "|||", "+++")


def table(kind: str) -> NDArray[np.uint8]:
    """256 colors (256, 3) for a map of that kind: "signed" or "magnitude"."""
    if kind == "signed":
        places = np.linspace(0, 1, 256)
        anchors = np.array(DIVERGING, dtype=float)
        at = np.linspace(0, 1, len(anchors))
        return np.stack([np.interp(places, at, channel) for channel in anchors.T], 1).round().astype(np.uint8)
    from matplotlib import colormaps

    colors = colormaps["viridis"](np.arange(256))[:, :3]
    return np.asarray(np.rint(colors * 255), dtype=np.uint8)


def gradient(kind: str, stops: int = 9) -> str:
    """The table as a CSS gradient from left (low) to right (high)."""
    colors = table(kind)[np.linspace(0, 255, stops).astype(int)]
    return "linear-gradient(90deg," + ",".join(f"rgb({r},{g},{b})" for r, g, b in colors) + ")"


def rendered(template: str, *, styles: Sequence[str] = (), script: str = "", **values: Any) -> str:
    """The template as HTML; whatever comes from outside is escaped.

    Args:
        template: its file's name.
        styles: names of style files, written into the page after page.css.
        script: name of a script file, written into the page; none where empty.
        values: what the template asks for.
    """
    templates = files("weakspot.report").joinpath("templates")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: templates.joinpath(name).read_text("utf-8")),
    )
    style = "".join(templates.joinpath(name).read_text("utf-8") for name in ("page.css", *styles))
    said = templates.joinpath(script).read_text("utf-8") if script else ""
    return environment.get_template(template).render(style=style, script=said, **values)
