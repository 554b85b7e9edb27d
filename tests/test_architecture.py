"""The house: imports only go up the list in docs/architecture.md, and every public name is where the contract says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import weakspot

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "weakspot"
FILES = sorted(
    path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or not path.stem.startswith("__")
)


def rooms() -> list[str]:
    listed = re.findall(
        r"^\| `([a-z_]+)(?:\.py|/)` \|", (ROOT / "docs/architecture.md").read_text("utf-8"), re.MULTILINE
    )
    assert len(listed) > 10
    return listed


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"weakspot.{alias.name}" for alias in node.names]
            modules = names if node.module == "weakspot" else [node.module]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        found |= {module.split(".")[1] for module in modules if module.startswith("weakspot.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_a_file_imports_only_from_rooms_above_its_own(path: Path) -> None:
    order = rooms()
    own = room_of(path)
    for other in imported_rooms(ast.parse(path.read_text("utf-8"))):
        if other != own:
            assert order.index(other) < order.index(own), f"{own} imports {other}, which is below it"


def test_every_room_is_on_the_list() -> None:
    assert {room_of(path) for path in FILES} == set(rooms())


def test_every_public_name_is_there_and_the_function_explain_is_not_shadowed_by_a_module() -> None:
    for name in weakspot.__all__:
        assert getattr(weakspot, name) is not None
    assert callable(weakspot.explain)
    assert callable(weakspot.overlap)
    assert {"fgsm", "pgd"} <= set(dir(weakspot.attacks))
    assert {"background", "border", "cam", "matched", "superpixels", "support", "top"} <= set(
        dir(weakspot.regions)
    )


def test_importing_weakspot_leaves_heavy_libraries_alone() -> None:
    heavy = [
        "cv2",
        "pandas",
        "matplotlib",
        "skimage",
        "scipy",
        "transformers",
        "torchvision",
        "timm",
        "jinja2",
        "typer",
        "pyarrow",
        "duckdb",
        "zarr",
    ]
    code = (
        "import sys, torch; before = set(sys.modules); import weakspot; "
        f"print([m for m in {heavy} if m in sys.modules and m not in before])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_no_source_file_names_a_registry_or_unpickles_freely() -> None:
    registries = re.compile("pypi" + r"\.org|download\.py" + "torch|registry" + r"\.npmjs")
    for path in [
        *SOURCE.rglob("*"),
        *ROOT.glob("*.*"),
        *ROOT.glob("docs/*.md"),
        ROOT / "Makefile",
        ROOT / ".ci/run",
    ]:
        if path.is_file() and path.suffix not in {".png", ".pyc", ".safetensors"}:
            text = path.read_text("utf-8")
            assert not registries.search(text), path
            if path.suffix == ".py" and SOURCE in path.parents:
                tree = ast.parse(text)
                for node in ast.walk(tree):
                    if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                        assert "weights_only=True" in ast.unparse(node), path
