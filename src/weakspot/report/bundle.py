"""One script from several ES modules, for pages and notebooks that cannot fetch a second file."""

import re
from collections.abc import Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable

IMPORT = re.compile(r'^import (\{[^}]*\}) from "\./([a-z_]+)\.js";$', re.MULTILINE)
EXPORT = re.compile(r"^export (?:async function\*?|function\*?|class|const) ([A-Za-z_$][\w$]*)", re.MULTILINE)
LOOSE = re.compile(r"^(?:import|export)\b.*", re.MULTILINE)


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
