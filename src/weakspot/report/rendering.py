"""Rendering: a template with its style and script in one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import jinja2


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
