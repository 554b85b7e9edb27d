"""The examples of the docs run as printed: Python blocks are executed, commands are parsed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
import sys
import types
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

import weakspot
from benchmarks import records
from weakspot import cli
from weakspot.attacks import available_attacks
from weakspot.budgets import read_budget
from weakspot.explanations.analysis import available_analyses
from weakspot.regions import segmentation
from weakspot.reproduction import PAPERS, read_reproduction
from weakspot.training import RECIPES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SLOW = {
    "README.md-0",
    "how-to-explain.md-0",
    "how-to-attack.md-0",
    "how-to-evaluate-a-defense.md-0",
    "how-to-explore.md-0",
    "how-to-map-weak-spots.md-0",
    "how-to-look-inside.md-3",
    "how-to-edit.md-2",
    "how-to-attack.md-3",
}
PYTHON = re.compile(r"```python\n(.*?)```(?:\n\nprints\n\n```(?:text)?\n(.*?)```)?", re.DOTALL)
TUTORIAL = ROOT / "docs/tutorial.md"
NOTEBOOK = ROOT / "docs/tutorial.ipynb"
BLOCKS = [
    pytest.param(*example, id=name, marks=pytest.mark.slow if name in SLOW else ())
    for page in PAGES
    if page != TUTORIAL
    for number, example in enumerate(PYTHON.findall(page.read_text("utf-8")))
    for name in [f"{page.name}-{number}"]
]
COMMANDS = sorted(
    {
        command.replace("\\\n", " ")
        for page in PAGES
        for block in re.findall(r"```console\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
        for command in re.findall(r"^weakspot (?:.*\\\n)*.*$", block, re.MULTILINE)
    }
)


def without_numbers(text: str) -> list[str]:
    """Words and signs of an output: numbers may differ in their last digits from one processor to the next."""
    return re.sub(r"[-+]?\d[\d.]*(e[-+]?\d+)?", "#", text).split()


@pytest.mark.parametrize(("block", "output"), BLOCKS)
def test_a_python_example_runs_and_prints_what_the_page_shows(
    block: str,
    output: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "example", "exec"), {"__name__": "example"})  # noqa: S102 - our own docs
    printed = capsys.readouterr().out
    if output:
        assert without_numbers(printed) == without_numbers(output), f"the page should show: {printed}"
    if "to_html" in block:
        assert (tmp_path / "report.html").stat().st_size > 100_000


@pytest.mark.slow
def test_the_tutorial_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its blocks build on each other."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "tutorial"}
    blocks = PYTHON.findall(TUTORIAL.read_text("utf-8"))
    assert len(blocks) >= 5
    for block, output in blocks:
        exec(compile(block, "tutorial", "exec"), names)  # noqa: S102 - our own docs
        printed = capsys.readouterr().out
        assert without_numbers(printed) == without_numbers(output), f"the page should show: {printed}"
    assert (tmp_path / "report.html").stat().st_size > 100_000


def module_of(name: str) -> Any:
    """A script of `docs/` as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / f"docs/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_notebook_has_the_code_of_the_tutorial() -> None:
    made = module_of("notebook").notebook(TUTORIAL.read_text("utf-8"))
    assert NOTEBOOK.read_text("utf-8") == made, "run python docs/notebook.py"
    code = ["".join(cell["source"]) for cell in json.loads(made)["cells"] if cell["cell_type"] == "code"]
    assert code == [block.strip() for block, _ in PYTHON.findall(TUTORIAL.read_text("utf-8"))]


@pytest.mark.slow
def test_the_notebook_runs_in_jupyter(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient").NotebookClient
    opened = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(opened)
    kernel = {"metadata": {"path": str(tmp_path)}}
    done = client(opened, timeout=300, kernel_name="python3", resources=kernel).execute()
    printed = "".join(
        output.get("text", "")
        for cell in done.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.get("name") == "stdout"
    )
    shown = "".join(output for _, output in PYTHON.findall(TUTORIAL.read_text("utf-8")))
    assert without_numbers(printed) == without_numbers(shown)


def test_parts_from_stored_results_and_code_are_those_of_today() -> None:
    parts = module_of("stored_parts")
    for page in parts.PAGES:
        assert (ROOT / "docs" / page).read_text("utf-8") == parts.filled(page), (
            "run python docs/stored_parts.py"
        )
    markers = [name for page in PAGES for name in re.findall(r"<!-- ([\w ]+) -->", page.read_text("utf-8"))]
    assert sorted(markers) == sorted([*parts.PAGES.values(), "end", "end", "stored benchmarks"])
    assert '"<!-- stored benchmarks -->"' in (ROOT / "docs/mkdocs_hooks.py").read_text("utf-8")


def test_the_analysis_of_the_how_to_measures_the_border() -> None:
    import torch

    from weakspot import Pairs

    page = (ROOT / "docs/how-to-add-an-analysis.md").read_text("utf-8")
    block = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    names: dict[str, object] = {}
    exec(compile(block, "example", "exec"), names)  # noqa: S102
    clean = torch.full((1, 3, 32, 32), 0.5)
    changed = clean.clone()
    changed[:, :, 0, :3] += 0.1  # three sites on the border
    changed[:, :, 16, 16] += 0.1  # one inside
    analysis = names["border"](None, Pairs(clean, changed, torch.tensor([0]), torch.tensor([1])))  # type: ignore[operator]
    assert analysis.scores["border_fraction"][0] == pytest.approx(0.75)


def named(words: list[str], *options: str) -> set[str]:
    """The names after these options, which may be separated by commas."""
    values = [value for option, value in pairwise(words) if option in options]
    return {name for value in values for name in value.split(",")}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_docs_has_options_and_names_that_exist(command: str) -> None:
    """The command is parsed, not run: unknown options and values of a wrong type are errors of the parser."""
    name, *words = shlex.split(command, comments=True)[1:]
    parser = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    parser.make_context(name, list(words))
    assert named(words, "--attack", "--attacks") <= set(available_attacks())
    assert named(words, "--analyses") <= set(available_analyses())
    assert named(words, "--recipe", "--recipes") <= set(RECIPES)
    for budget in named(words, "--budget"):
        read_budget(budget)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_the_text_of_the_docs_exist(page: Path) -> None:
    commands = typer.main.get_command(cli.app).commands.values()  # type: ignore[attr-defined]
    existing = {
        option
        for command in commands
        for param in command.params
        for option in (*param.opts, *param.secondary_opts)
    }
    inline = re.findall(r"`([^`\n]*)`", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL))
    mentioned = {option for code in inline for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", code)}
    assert mentioned <= existing | {"--help", "--version"}


def test_the_docs_have_commands_of_every_kind() -> None:
    assert {command.split()[1] for command in COMMANDS} >= {
        "attack", "audit", "compare", "defend", "dissect", "explain", "report", "train",
    }  # fmt: skip


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "SECURITY.md", ROOT / "CODE_OF_CONDUCT.md"], ids=lambda page: page.name
)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text("utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_table_of_backgrounds_has_the_numbers_of_the_code() -> None:
    rows = re.findall(
        r"^\| (?:gray|color|either|the same)\b.*$", (ROOT / "docs/how-to-attack.md").read_text(), re.MULTILINE
    )
    least, most = segmentation.PLAUSIBLE
    assert [re.findall(r"[\d./]*\d%?", row) for row in rows] == [
        [f"{segmentation.INK}"],
        [],
        [f"{least:.0%}", f"{most:.0%}", f"{segmentation.FOREGROUND:.0%}"],
        [str(Fraction(segmentation.INNER))],
    ]


def test_what_was_not_found_has_one_wording() -> None:
    """The glossary has it: "not found", "no ... was found", "this does not mean that none exists"."""
    texts = [
        *PAGES,
        *(path for path in (ROOT / "src").rglob("*.*") if path.suffix in {".py", ".js", ".html"}),
    ]
    retired = re.compile(
        r"no proof that|\(failed\)[\"']|[Tt]he attack failed|[Nn]one was found|may have missed"
    )
    assert {path.name: found for path in texts if (found := retired.findall(path.read_text("utf-8")))} == {}


def test_the_citation_names_the_version_of_the_package() -> None:
    version = r'^version(?:: | = ")([\d.]+)"?$'
    files = [(ROOT / name).read_text("utf-8") for name in ("CITATION.cff", "pyproject.toml")]
    cited, packaged = (re.findall(version, text, re.MULTILINE) for text in files)
    assert cited == packaged != []


def test_every_page_of_the_docs_is_in_the_menu_of_the_site() -> None:
    menu = re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= set(menu)


def test_what_a_benchmark_prints_is_kept_and_shown_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "cifar", "--json", str(tmp_path / "run.json"), "--images", "2"])
    with records.recorded("bench", "What it measures."):
        assert sys.argv == ["bench", "cifar", "--images", "2"]
        sys.stdout.write("A title\n\n| job | seconds |\n|---|---|\n| one | 0.5 |\n| two | -1 |\n\nthe end\n")
    assert "| two | -1 |" in capsys.readouterr().out
    page = records.stored_tables(tmp_path)
    assert (
        "## bench\n\nWhat it measures.\n\nA title\n\n| job | seconds |\n| --- | --- |\n| one | 0.5 |" in page
    )
    assert "the end" in page
    assert "`python -m benchmarks.bench cifar --images 2`" in page
    assert not list(tmp_path.glob("*.tmp"))


def test_a_benchmark_without_a_file_only_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench"])
    with records.recorded("bench", ""):
        sys.stdout.write("hello\n")
    assert capsys.readouterr().out == "hello\n"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks/results").glob("*.json")), ids=lambda path: path.stem
)
def test_stored_benchmarks_have_tables(path: Path) -> None:
    record = records.Record(**json.loads(path.read_text("utf-8")))
    assert any(not isinstance(part, str) for part in record.parts)
    assert (ROOT / f"benchmarks/{record.benchmark}.py").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "docs/results").glob("*.json")), ids=lambda path: path.stem)
def test_stored_reproductions_are_those_of_today(path: Path) -> None:
    """Their methods, limits and quotes are those of the code that would measure them again."""
    result = read_reproduction(path)
    about = PAPERS[result.paper].about
    assert (result.title, result.method, result.limits) == (about.TITLE, about.METHOD, about.LIMITS)
    assert {claim.name: claim.quote for claim in result.claims} == dict(about.QUOTES)
    assert path.stem.removeprefix(result.paper)[:1] in {"", "-"}
    assert f"paper-{path.stem}.md" in (ROOT / "mkdocs.yml").read_text("utf-8")
    assert result.made.cpu_seconds > 0
    assert "/tmp" not in result.made.command  # noqa: S108 - no path of one machine


def test_the_reference_has_every_name_of_the_face() -> None:
    shown = re.findall(r"^::: (\S+)", (ROOT / "docs" / "reference.md").read_text("utf-8"), re.MULTILINE)
    known: set[str] = set()
    for target in shown:
        room, _, name = target.rpartition(".")
        try:
            known |= set(importlib.import_module(target).__all__)
        except ImportError:
            assert hasattr(importlib.import_module(room), name), target
            known.add(name)
    modules = {name for name in weakspot.__all__ if isinstance(getattr(weakspot, name), types.ModuleType)}
    assert set(weakspot.__all__) - modules <= known
