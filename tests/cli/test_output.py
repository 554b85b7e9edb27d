"""Output on a terminal: tables, sentences, and text of the user that is never markup."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from rich.text import Text

from tests.cli.conftest import TINY, Run
from weakspot.cli.app import complain, note
from weakspot.cli.output import (
    add_row,
    first_rows,
    make_table,
    outcome_sentence,
    print_rows,
    print_table,
    print_text,
    shorten_name,
)

HOSTILE = ":smile: [red]five: [/red] [link=http://x]"
ESCAPES = "a\x1b[31mred\x07\x9b2J\u202egnp"


@pytest.mark.parametrize("width", [80, 200])
def test_user_text_is_never_markup(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    table = make_table(["image"])
    add_row(table, HOSTILE)
    print_table(table)
    print_rows([{HOSTILE: HOSTILE}])
    print_text(HOSTILE)
    note(HOSTILE)
    complain(HOSTILE)
    captured = capsys.readouterr()
    assert captured.out.count(HOSTILE) == 4
    assert captured.err.count(HOSTILE) == 2


def test_control_characters_are_shown_as_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    table = make_table(["image"])
    add_row(table, ESCAPES + "\nweakspot: gate passed")
    print_table(table)
    print_text(ESCAPES)
    note(ESCAPES + "\nweakspot: gate passed")
    complain(ESCAPES)
    captured = capsys.readouterr()
    for text in (captured.out, captured.err):
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(text)
        assert text.count(r"a\x1b[31mred\x07\x9b2J\u202egnp") == 2
        assert not any(line.startswith("weakspot: gate") for line in text.splitlines())


def test_hostile_names_in_commands(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / "odd"
    folder.mkdir()
    names = [":smile: [red].png", "five: \x1b[2J.png", "no\nlines.png"]
    for name in names:
        Image.new("RGB", (64, 64), (90, 40, 10)).save(folder / name, format="png")
    (folder / "\x1b[31mbroken.png").write_bytes(b"no picture")
    for command in (("attack",), ("explain", "--analyses", "none")):
        ended = run(*command, folder, *TINY, "--out", command[0])
        assert ended.code == 0
        assert ":smile: [red].png" in ended.out
        assert r"five: \x1b[2J.png" in ended.out
        assert r"no\nlines.png" in ended.out
        assert r"\x1b[31mbroken.png" in ended.err
        assert "\x1b" not in ended.out + ended.err


def test_first_rows_are_five_without_all() -> None:
    assert first_rows([*range(7)], every=False) == ([0, 1, 2, 3, 4], 2)
    assert first_rows([*range(7)], every=True) == ([*range(7)], 0)
    assert first_rows([1], every=False) == ([1], 0)


def test_short_names_keep_both_ends() -> None:
    name = "holidays/2024/IMG_20240817_183352_0412.jpg"
    assert shorten_name("cat.jpg") == "cat.jpg"
    for width in (9, 10, 26):
        short = shorten_name(name, width)
        assert len(short) == width
        start, end = short.split("…")
        assert name.startswith(start)
        assert name.endswith(end)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Eight pictures with long names that differ only at the end."""
    folder = tmp_path / "many"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(8):
        pixels = (torch.rand(64, 64, 3, generator=generator) * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / f"a very long name of a photograph {number:03d}.png")
    return folder


def test_tables_fit_80_columns_and_sentences_come_first(
    run: Run, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in (("attack",), ("explain", "--analyses", "overlap")):
        ended = run(*command, many, *TINY, "--out", command[0])
        lines = ended.out.splitlines()
        assert "of 8 images fooled as 8-bit files" in "\n".join(lines[:3])
        start = next(number for number, line in enumerate(lines) if line.startswith("image "))
        rows = lines[start : lines.index("", start)]
        assert max(map(len, rows)) <= 80
        assert sum("00" in line and ".png" in line for line in rows) == 5
        assert "... and 3 more" in ended.out
        whole = run(*command, many, *TINY, "--all", "--out", f"{command[0]}-all")
        lines = whole.out.splitlines()
        assert sum("a very long name of a photograph 00" in line for line in lines if " → " in line) == 8
        assert "... and" not in whole.out


def test_styled_cells_stay_styled() -> None:
    table = make_table(["fooled"])
    add_row(table, Text("no", style="yellow"))
    (cell,) = table.columns[0].cells
    assert isinstance(cell, Text)


@pytest.mark.parametrize(
    ("correct", "done", "sentence"),
    [
        ([True, True], "fooled", "1 of 2 images fooled as 8-bit files (2 before rounding), in 1 s."),
        (
            [True, False],
            "fooled",
            "1 of 1 correctly classified image fooled as 8-bit files (1 before rounding), in 1 s.",
        ),
        (
            [True, True],
            "changed to cat",
            "1 of 2 images changed to cat as 8-bit files (2 before rounding), in 1 s.",
        ),
        ([False, False], "fooled", "Images classified as their label without an attack: none of 2, in 1 s."),
    ],
)
def test_outcomes_count_only_what_an_attack_can_do(correct: list[bool], done: str, sentence: str) -> None:
    scores = pd.DataFrame({"success": [True, True], "success_8bit": [True, False]})
    assert outcome_sentence(scores, correct, done, ", in 1 s") == sentence


def test_quiet_prints_errors_and_nothing_else(run: Run, photographs: Path, tmp_path: Path) -> None:
    images = sorted(path.name for path in photographs.iterdir())
    for label in range(2):  # some labels are wrong, whatever the network predicts
        (tmp_path / "labels.csv").write_text(
            "file,label\n" + "\n".join(f"photos/{name},{label}" for name in images)
        )
        options = ("attack", photographs, *TINY, "--labels", "labels.csv", "--steps", 1)
        loud = run(*options, "--out", "made")
        quiet = run(*options, "--quiet", "--out", "made")
        assert (quiet.out, quiet.err) == ("", "")
        if "note: " in loud.err:
            assert run(*options, "--out", "made").err == loud.err  # --quiet holds for one command
            break
    else:
        pytest.fail("every label was right")
    (photographs / "broken.png").write_bytes(b"broken")
    assert (
        "broken.png: not an image in a known format; skipped"
        in run("attack", photographs, *TINY, "--steps", 1, "--quiet", "--out", "made").err
    )


@pytest.mark.parametrize("fold", [(), ("accuracy after",)])
def test_numbers_of_a_table_are_never_cut_off(
    fold: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    table = make_table(["accuracy after", "undefended", "95%"], fold=fold)
    add_row(table, "transferred from the undefended model", "100%", "36%-99.6%")
    print_table(table)
    assert "100%" in (out := capsys.readouterr().out)
    assert "36%-99.6%" in out
