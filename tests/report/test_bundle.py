"""Bundling of ES modules: what a page of one file runs equals what the modules do apart."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from weakspot.report.rendering import bundled, drawing_modules

NODE = shutil.which("node") or ""
needs_node = pytest.mark.skipif(not NODE, reason="node runs the scripts")


def write(folder: Path, **modules: str) -> Path:
    for name, text in modules.items():
        (folder / f"{name}.js").write_text(text, "utf-8")
    return folder


def run(folder: Path, text: str) -> str:
    (folder / "whole.mjs").write_text(text, "utf-8")
    return subprocess.run(
        [NODE, str(folder / "whole.mjs")], capture_output=True, text=True, check=True
    ).stdout


@needs_node
def test_equal_names_in_different_modules_stay_apart(tmp_path: Path) -> None:
    write(
        tmp_path,
        one="const inner = 1;\nexport const first = () => inner;\nexport class Kept {}\n",
        two='import { first } from "./one.js";\nconst inner = 20;\n'
        "export async function second() { return inner + first(); }\n",
        main='import { second } from "./two.js";\nimport { first as renamed, Kept } from "./one.js";\n'
        "const inner = 300;\nconsole.log(inner + renamed(), await second(), new Kept() instanceof Kept);\n",
    )
    whole = bundled("main.js", [tmp_path])
    assert whole.count("const inner = 1;") == 1  # imported twice, present once
    assert run(tmp_path, whole) == "301 21 true\n"


@needs_node
def test_the_entry_keeps_its_exports(tmp_path: Path) -> None:
    write(
        tmp_path, part="export const a = 5;\n", main='import { a } from "./part.js";\nexport default { a };\n'
    )
    (tmp_path / "whole.mjs").write_text(bundled("main", [tmp_path]), "utf-8")
    check = "import whole from './whole.mjs'; console.log(whole.a);"
    done = subprocess.run(
        [NODE, "--input-type=module", "-e", check], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "5\n"


@pytest.mark.parametrize(
    "text",
    ["export let a = 1;", "export default 1;", 'import * as a from "./b.js";', "const a = 1;\nexport { a };"],
)
def test_other_forms_are_refused_instead_of_broken(tmp_path: Path, text: str) -> None:
    write(tmp_path, part=text, main='import { a } from "./part.js";\n')
    with pytest.raises(ValueError, match=r"part.js must write imports"):
        bundled("main.js", [tmp_path])


def test_circles_and_missing_modules_are_named(tmp_path: Path) -> None:
    write(
        tmp_path,
        a='import { b } from "./b.js";\nexport const a = 1;',
        b='import { a } from "./a.js";\nexport const b = 1;',
    )
    with pytest.raises(ValueError, match="a -> b -> a"):
        bundled("a.js", [tmp_path])
    write(tmp_path, main='import { c } from "./c.js";\n')
    with pytest.raises(FileNotFoundError, match=r"c\.js must be in"):
        bundled("main.js", [tmp_path])


@pytest.mark.parametrize("entry", ["page.js", "units.js", "run.js"])
def test_scripts_of_the_pages_have_no_import_left(entry: str) -> None:
    assert not re.search(r"^\s*(import|export)\b", bundled(entry), re.MULTILINE)


def test_a_folder_of_its_own_goes_before_the_drawing_modules(tmp_path: Path) -> None:
    write(tmp_path, colors="export const tables = 7;\n", main='import { tables } from "./colors.js";\n')
    assert "tables = 7" in bundled("main.js", [tmp_path])
    assert drawing_modules().joinpath("colors.js").is_file()
