"""The rules of docs/architecture.md: rooms in order, no circles, no import upward, sizes and names of files."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from inspect import isfunction
from pathlib import Path

import weakspot

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "weakspot"
FACE = {"weakspot", "weakspot.__main__"}  # these two may import everything


@cache
def modules() -> dict[str, Path]:
    """Name of every module under src/weakspot, and its file."""
    names = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = ("weakspot", *path.relative_to(SOURCE).with_suffix("").parts)
        names[".".join(parts).removesuffix(".__init__")] = path
    return names


@cache
def rooms() -> list[str]:
    """The rooms in the order of the table in docs/architecture.md."""
    page = (ROOT / "docs/architecture.md").read_text("utf-8")
    return re.findall(r"^\| `([a-z_]+)(?:\.py|/)` \|", page, re.MULTILINE)


@cache
def packages_of_audits() -> list[str]:
    """The packages inside audit/ in the order of their table in docs/architecture.md."""
    page = (ROOT / "docs/architecture.md").read_text("utf-8")
    return re.findall(r"^\| `audit/([a-z_]+)/` \|", page, re.MULTILINE)


@cache
def imports() -> dict[str, set[str]]:
    """For every module, the weakspot modules it imports, at its top, inside functions and for types alone.

    An import for types alone counts: a module that names another room's type depends on that room. A name imported
    from the face counts as an import of "weakspot".
    """
    found: dict[str, set[str]] = {}
    for name, path in modules().items():
        targets = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} has a relative import in line {node.lineno}"
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                targets |= {item if item in modules() else str(node.module) for item in full}
            elif isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
        found[name] = {target for target in targets if target.split(".")[0] == "weakspot"} - {name}
    return found


def room_of(module: str) -> str:
    return module.split(".")[1]


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that import one another, directly or through others."""
    reached = {module: set(targets) for module, targets in graph.items()}
    for middle in graph:
        for module, targets in reached.items():
            if middle in targets:
                reached[module] = targets | reached[middle]
    groups = {frozenset(t for t in reached[m] if m in reached[t]) for m in graph if m in reached[m]}
    return sorted((set(group) for group in groups), key=sorted)


def test_the_list_in_the_docs_names_every_room_once() -> None:
    assert Counter(rooms()) == Counter({room_of(name) for name in modules() if name not in FACE})


def test_modules_import_only_from_rooms_above_their_own() -> None:
    order = {room: number for number, room in enumerate(rooms())}
    upward = {
        (name, target)
        for name, targets in imports().items()
        for target in targets
        if name not in FACE and target not in FACE and order[room_of(target)] > order[room_of(name)]
    }
    assert not upward


def test_packages_of_audits_import_only_from_those_above_them() -> None:
    order = {package: number for number, package in enumerate(packages_of_audits())}
    inside = {name: name.split(".")[2] for name in modules() if name.startswith("weakspot.audit.")}
    assert set(inside.values()) == set(order)
    upward = {
        (name, target)
        for name, package in inside.items()
        for target in imports()[name] & inside.keys()
        if order[inside[target]] > order[package]
    }
    assert not upward


def test_modules_do_not_import_the_package_itself() -> None:
    """Names come from the modules that define them: the face imports every room, so that would be a circle."""
    offenders = {name for name, targets in imports().items() if name not in FACE and targets & FACE}
    assert not offenders


def test_files_that_the_docs_name_exist() -> None:
    for page in (ROOT / "docs/architecture.md", ROOT / "CONTRIBUTING.md"):
        for name in re.findall(r"`([a-z_/]+/(?:[a-z_]+\.py)?)`", page.read_text("utf-8")):
            assert (ROOT / name).exists() or (SOURCE / name).exists(), f"{page.name} names {name}"


def test_there_are_no_circles_inside_or_between_rooms() -> None:
    graph = {name: targets - FACE for name, targets in imports().items() if name not in FACE}
    assert not circles(graph)


def test_the_search_for_circles_finds_planted_ones() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    planted = {"a": {"b"}, "b": {"a"}, "c": {"d"}, "d": {"e"}, "e": {"c"}, "f": {"a", "c"}}
    assert circles(planted) == [{"a", "b"}, {"c", "d", "e"}]


def test_no_file_is_longer_than_350_lines() -> None:
    lengths = {name: len(path.read_text("utf-8").splitlines()) for name, path in modules().items()}
    assert not {name: length for name, length in lengths.items() if length > 350}


def test_no_two_modules_have_one_name() -> None:
    stems = Counter(path.stem for path in modules().values() if not path.stem.startswith("__"))
    assert not {stem for stem, count in stems.items() if count > 1}


def test_modules_are_named_with_nouns() -> None:
    """Four words in -ing that are terms of the field are enough (training, masking, recording, rendering)."""
    assert len([name for name in modules() if name.endswith("ing")]) <= 4


def test_every_public_name_exists_and_no_module_of_the_package_has_it() -> None:
    """A function with the name of a submodule would be replaced by the submodule as soon as that is imported."""
    for name, path in modules().items():
        if path.name != "__init__.py":
            continue
        package = importlib.import_module(name)
        public = set(getattr(package, "__all__", ()))
        assert {item for item in public if not hasattr(package, item)} == set(), name
        submodules = {module.rpartition(".")[2] for module in modules() if module.rpartition(".")[0] == name}
        functions = {f"{name}.{item}" for item in public & submodules if isfunction(getattr(package, item))}
        assert not functions


def test_the_face_has_the_names_of_the_readme() -> None:
    assert {"Classifier", "LocalEdits", "Pairs", "explain", "load", "overlap"} <= set(weakspot.__all__)
    assert {"bim", "ensemble", "few_pixel", "fgsm", "pgd", "strattack"} <= set(weakspot.attacks.__all__)
    assert {"background", "border", "cam", "matched", "superpixels", "support", "top"} <= set(
        weakspot.regions.__all__
    )


def test_importing_weakspot_loads_no_heavy_library() -> None:
    heavy = (
        "cv2 pandas matplotlib skimage scipy transformers torchvision timm jinja2 typer pyarrow duckdb zarr"
    )
    code = (
        "import sys, torch; before = set(sys.modules); import weakspot; "
        f"print([m for m in {heavy.split()} if m in sys.modules and m not in before])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_no_file_names_a_package_registry() -> None:
    registries = re.compile("pypi" + r"\.org|download\.py" + "torch|registry" + r"\.npmjs")
    pages = [*ROOT.glob("*.*"), *ROOT.glob("docs/*.md"), ROOT / "Makefile", ROOT / ".ci/run"]
    binary = {".png", ".pyc", ".safetensors"}
    for path in [*SOURCE.rglob("*"), *pages]:
        if path.is_file() and path.suffix not in binary:
            assert not registries.search(path.read_text("utf-8")), path


def test_weights_are_never_unpickled() -> None:
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), path


def test_the_first_verdict_loads_neither_a_compiler_nor_statistics_that_it_does_not_use() -> None:
    code = (
        "import sys, torch, weakspot\n"
        "from weakspot.zoo import build\n"
        "model = weakspot.Classifier.wrap(build('two_conv', classes=3, channels=3, size=(32, 32), seed=0))\n"
        "images = torch.rand(1, 3, 32, 32)\n"
        "pairs = weakspot.attacks.pgd(model, images, model(images).argmax(1), steps=2)\n"
        "weakspot.explain(model, pairs, analyses=['overlap']).verdict()\n"
        "weakspot.LocalEdits(model, images[0])\n"
        "unused = 'torch._dynamo', 'scipy.stats', 'scipy.ndimage', 'skimage.measure', 'matplotlib', 'jinja2'\n"
        "print([name for name in unused if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]", result.stderr
