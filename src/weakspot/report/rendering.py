"""Rendering: a template with its style and script in one HTML file, and the colors that pages and figures share.

The script is bundled from ES modules, for pages and notebooks that cannot fetch a second file.
"""

import base64
import hashlib
import io
import re
import zlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Blue, white, orange: the two ends differ in hue for every kind of color vision.
DIVERGING = ((0, 69, 134), (86, 140, 190), (247, 247, 247), (236, 152, 60), (166, 80, 0))
# Okabe and Ito 2008; category 0 leaves the photograph as it is.
CATEGORIES = ("#00000000", "#0072b2", "#d55e00", "#f0e442", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
HATCHES = ("", "", "///", "...", "xxx", "---", "|||", "+++")
IMPORT = re.compile(r'^import (\{[^}]*\}) from "\./([a-z_]+)\.js";$', re.MULTILINE)
EXPORT = re.compile(r"^export (?:async function\*?|function\*?|class|const) ([A-Za-z_$][\w$]*)", re.MULTILINE)
LOOSE = re.compile(r"^(?:import|export)\b.*", re.MULTILINE)


def color_table(kind: str) -> NDArray[np.uint8]:
    """256 colors (256, 3) for a map of kind "signed" or "magnitude"."""
    if kind == "signed":
        places, anchors = np.linspace(0, 1, 256), np.array(DIVERGING, dtype=float)
        at = np.linspace(0, 1, len(anchors))
        return np.stack([np.interp(places, at, channel) for channel in anchors.T], 1).round().astype(np.uint8)
    from matplotlib import colormaps

    colors = colormaps["viridis"](np.arange(256))[:, :3]
    return np.asarray(np.rint(colors * 255), dtype=np.uint8)


def shared_colors() -> dict[str, object]:
    """The color tables and the colors of categories, for the drawing modules (static/colors.js)."""
    return {
        "tables": {kind: base64_text(color_table(kind).tobytes()) for kind in ("signed", "magnitude")},
        "categories": list(CATEGORIES),
    }


def gradient(kind: str, stops: int = 9) -> str:
    """The color table as a CSS gradient from left (low) to right (high)."""
    colors = color_table(kind)[np.linspace(0, 255, stops).astype(int)]
    return "linear-gradient(90deg," + ",".join(f"rgb({r},{g},{b})" for r, g, b in colors) + ")"


def base64_text(content: bytes) -> str:
    """Bytes as base64 text."""
    return base64.b64encode(content).decode("ascii")


def compressed_levels(values: NDArray[np.floating], low: float, high: float) -> str:
    """Values from `low` to `high` as 8-bit levels, compressed, in base64."""
    # A map of one value has no range; then every level is 0.
    levels = np.rint((values - low) * (255 / ((high - low) or 1))).astype(np.uint8)
    return base64_text(zlib.compress(levels.tobytes(), 9))


def data_url(kind: str, content: bytes) -> str:
    """A file as a data URL; `kind` is its MIME type."""
    return f"data:{kind};base64,{base64_text(content)}"


def picture_url(pixels: NDArray[np.uint8], *, jpeg_quality: int | None = None) -> str:
    """(H, W) or (H, W, 3) of 8 bits as the data URL of a PNG file, or of a JPEG file if a quality is given."""
    buffer = io.BytesIO()
    if jpeg_quality is None:
        Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
        return data_url("image/png", buffer.getvalue())
    Image.fromarray(pixels).save(buffer, "JPEG", quality=jpeg_quality)
    return data_url("image/jpeg", buffer.getvalue())


def rendered(
    template: str,
    *,
    styles: Sequence[str] = (),
    rules: str = "",
    script: str = "",
    later: Sequence[str] = (),
    **values: object,
) -> str:
    """The template as HTML; all values are escaped.

    The page's content security policy names its style sheet and its scripts by their SHA-256 hashes: a browser runs no
    other script, even if one were injected. Style attributes are blocked, too; scripts may set styles.

    Args:
        template: name of its file.
        styles: names of style sheets, inserted after page.css.
        rules: more style rules.
        script: name of the ES module of the page, inserted with all that it imports.
        later: scripts that it inserts into the page.
        values: the template's variables.
    """
    style = drawing_modules().joinpath("drawing.css").read_text("utf-8")
    style += "".join(map(_template, ("page.css", *styles))) + rules
    code = bundled(script) if script else ""
    # A policy without a hash must say 'none'.
    hashes = [_content_hash(content) for content in (code, *later) if content] or ["'none'"]
    return (
        _environment()
        .get_template(template)
        .render(
            style=style,
            script=code,
            style_hash=_content_hash(style),
            script_hashes=" ".join(hashes),
            **values,
        )
    )


def fragment(template: str, **values: object) -> str:
    """The template as a part of a page, without style and script; all values are escaped."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> jinja2.Environment:
    # StrictUndefined: a misspelled variable raises instead of leaving a gap in the page.
    return jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        loader=jinja2.FunctionLoader(_template),
    )


def _template(name: str) -> str:
    return files("weakspot.report").joinpath("templates").joinpath(name).read_text("utf-8")


def _content_hash(content: str) -> str:
    """The source expression of an inline script or style in a content security policy."""
    return f"'sha256-{base64_text(hashlib.sha256(content.encode()).digest())}'"


def drawing_modules() -> Traversable:
    """The folder of the modules that draw pictures and maps, in the report and in the explorer."""
    return files("weakspot.report").joinpath("static")


def bundled(entry: str, folders: Sequence[Traversable] = ()) -> str:
    """The module `entry` and all modules that it imports, as one script.

    Each imported module becomes a function that is called once and returns its exports, so names of different modules
    do not collide. The entry keeps its own exports, such as the default export of a notebook widget.

    Args:
        entry: name of the module's file, such as "page.js".
        folders: where modules are looked for, before the folder of the drawing modules.

    Raises:
        ValueError: if a module uses another form of import or export than `import {a, b} from "./name.js";` and
            `export` before a function, class or const; or if modules import each other in a circle.
        FileNotFoundError: if a module does not exist.
    """
    places = (*folders, drawing_modules())
    parts: dict[str, str] = {}

    def add(name: str, importers: tuple[str, ...]) -> str:
        """Append the modules that `name` imports, and return its text with these imports as constants."""
        if name in importers:
            raise ValueError(
                f"modules must not import each other in a circle, got {' -> '.join((*importers, name))}"
            )
        text = _read(f"{name}.js", places)
        for _, imported in IMPORT.findall(text):
            if imported not in parts:
                # Depth first: what a module imports stands before it in the script.
                inner = add(imported, (*importers, name))
                exports = ", ".join(EXPORT.findall(inner))
                body = EXPORT.sub(lambda match: match[0].removeprefix("export "), inner)
                _check_forms(imported, body)
                parts[imported] = (
                    f"const {imported}_module = (() => {{\n{body}\nreturn {{ {exports} }};\n}})();\n"
                )
        return IMPORT.sub(lambda match: f"const {_renamed(match[1])} = {match[2]}_module;", text)

    text = add(entry.removesuffix(".js"), ())
    return "".join(parts.values()) + text


def _renamed(names: str) -> str:
    """The names of an import as those of a destructuring assignment.

    >>> _renamed("{ a, b as c }")
    '{ a, b: c }'
    """
    return re.sub(r"\s+as\s+", ": ", names)


def _read(name: str, places: Sequence[Traversable]) -> str:
    for place in places:
        file = place.joinpath(name)
        if file.is_file():
            return file.read_text("utf-8")
    raise FileNotFoundError(f"module {name} must be in one of {', '.join(map(str, places))}")


def _check_forms(name: str, body: str) -> None:
    loose = LOOSE.search(body)
    if loose:
        raise ValueError(
            f'{name}.js must write imports as import {{a, b}} from "./name.js"; and exports as export before a '
            f"function, class or const, got {loose[0]!r}"
        )
