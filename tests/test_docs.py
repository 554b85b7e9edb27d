"""The examples of the docs run as printed: Python blocks are executed, commands are parsed."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import typer

from weakspot import cli
from weakspot.attacks import available_attacks
from weakspot.budgets import read_budget
from weakspot.explanations.analysis import available_analyses
from weakspot.training import RECIPES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SLOW = {"README.md-0", "how-to-attack.md-0", "how-to-evaluate-a-defense.md-0"}
PYTHON = re.compile(r"```python\n(.*?)```(?:\n\nprints\n\n```(?:text)?\n(.*?)```)?", re.DOTALL)
BLOCKS = [
    pytest.param(*example, id=name, marks=pytest.mark.slow if name in SLOW else ())
    for page in PAGES
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


def test_the_citation_names_the_version_of_the_package() -> None:
    version = r'^version(?:: | = ")([\d.]+)"?$'
    files = [(ROOT / name).read_text("utf-8") for name in ("CITATION.cff", "pyproject.toml")]
    cited, packaged = (re.findall(version, text, re.MULTILINE) for text in files)
    assert cited == packaged != []


def test_every_page_of_the_docs_is_in_the_menu_of_the_site() -> None:
    menu = re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= set(menu)
