"""Progress: what a step says of itself, where it is shown, and that no long call is silent."""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import weakspot
from tests.clock import FakeClock
from weakspot import _progress, attacks
from weakspot._progress import Step, open_display, part, shown


class Slow(nn.Module):
    """A classifier whose every pass takes seconds of the fake clock."""

    def __init__(self, clock: FakeClock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        )

    def forward(self, images: Tensor) -> Tensor:
        self.clock.advance(self.seconds)
        result: Tensor = self.layers(images)
        return result


def test_a_step_states_amount_rate_and_time_left(clock: FakeClock) -> None:
    step = Step("auditing", 24)
    assert step.status == "0/24 images, 0 s so far"
    clock.advance(4)
    step(0.25)
    assert step.status == "6/24 images, 1.5 images/s, about 12 s left"
    clock.advance(8)  # nothing new: the rate falls and the end moves away
    assert step.status == "6/24 images, 2 s per image, about 36 s left"
    step(0.5)
    assert step.status == "12/24 images, 1 image/s, about 12 s left"


def test_an_attack_on_all_images_at_once_does_not_claim_that_some_are_finished(clock: FakeClock) -> None:
    step = Step("attacking", 24, counted=False)
    clock.advance(12)
    step(0.5)
    assert step.status == "50% of 24 images, 1 image/s, about 12 s left"
    alone = Step("attacking", 1, counted=False)
    clock.advance(10)
    alone(0.5)
    assert alone.status == "50%, about 10 s left"


def test_a_slow_rate_is_given_in_seconds_per_unit(clock: FakeClock) -> None:
    step = Step("training", 10, "epoch")
    clock.advance(50)
    step(0.1)
    assert step.status == "1/10 epochs, 50 s per epoch, about 8 min left"
    analyses = Step("explaining", 4, "analysis")
    clock.advance(40)
    analyses(0.25)
    assert analyses.status == "1/4 analyses, 40 s per analysis, about 2 min left"


def test_what_an_earlier_run_had_done_does_not_count_for_the_rate(clock: FakeClock) -> None:
    step = Step("auditing", 100)
    step(0.9)  # at once: the audit was resumed
    clock.advance(10)
    step(0.95)
    assert step.status == "95/100 images, 2 s per image, about 10 s left"


def test_the_rate_is_that_of_the_last_minute(clock: FakeClock) -> None:
    step = Step("training", 100)
    clock.advance(100)
    step(0.5)  # half in 100 s
    for done in range(51, 61):
        clock.advance(10)  # then one in a hundred every 10 s
        step(done / 100)
    assert step.status.endswith("10 s per image, about 7 min left")


def test_progress_never_decreases_and_never_exceeds_the_whole(clock: FakeClock) -> None:
    step = Step("x", 3)
    clock.advance(2)
    step(2 / 3)
    step(0.1)
    assert step.status.startswith("2/3")
    step(1.5)
    assert step.status.startswith("3/3")
    assert step.status.endswith("about 0 s left")


def test_a_part_is_scaled_into_the_whole() -> None:
    told: list[float] = []
    second = part(told.append, 1, 2, 4)
    assert second is not None
    second(0.0)
    second(1.0)
    assert told == [0.25, 0.5]
    assert part(None, 0, 1) is None


def test_false_and_none_show_nothing_and_a_function_is_passed_on() -> None:
    for off in (None, False):
        with shown(off, "attacking") as report:
            assert report is None
    told: list[float] = []
    with shown(told.append, "attacking") as report:
        assert report == told.append


def written(clock: FakeClock, work: Callable[[_progress.Display], None]) -> list[tuple[float, str]]:
    """The lines that are printed where standard error is no terminal, with their times."""
    lines: list[tuple[float, str]] = []

    class Timed(io.StringIO):
        def write(self, text: str) -> int:
            if text.strip():
                lines.append((clock.now, text.strip()))
            return len(text)

    with open_display(Console(file=Timed(), width=80)) as display:
        work(display)
    return lines


def test_without_a_terminal_there_is_a_line_after_5_seconds_and_then_every_30(clock: FakeClock) -> None:
    def work(display: _progress.Display) -> None:
        display.step("loading [bold]:smile:[/bold]")
        clock.advance(20)
        step = display.step("auditing", total=4)
        clock.advance(40)
        step(0.25)
        clock.advance(10)

    assert written(clock, work) == [
        (5.0, "loading [bold]:smile:[/bold]: 5 s so far"),
        (35.0, "auditing: 0/4 images, 15 s so far"),
        (65.0, "auditing: 1/4 images, 45 s per image, about 2 min left"),
    ]


def test_a_terminal_that_cannot_draw_bars_gets_lines(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = io.StringIO()
    with open_display(Console(file=stream, force_terminal=True, width=80, color_system=None)) as display:
        display.step("attacking", total=24)
        clock.advance(6)
    assert stream.getvalue().strip() == "attacking: 0/24 images, 5 s so far"


def test_on_a_terminal_there_is_a_bar_from_the_start_that_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")  # rich draws no bar on a "dumb" one, whatever it is told
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, highlight=False)
    with open_display(console) as display:
        step = display.step("attacking", total=24)
        step(0.5)
    text = stream.getvalue()
    assert "attacking" in text
    assert "12/24 images" in text
    assert "\x1b[2K" in text.rpartition("12/24")[2]  # the line is erased


def test_in_a_notebook_the_cell_shows_an_element_of_html(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[str] = []
    handle = types.SimpleNamespace(update=pages.append)
    fake = types.ModuleType("IPython")
    fake.get_ipython = lambda: types.SimpleNamespace(kernel=1)  # type: ignore[attr-defined]
    display = types.ModuleType("IPython.display")
    display.HTML = str  # type: ignore[attr-defined]
    display.display = lambda page, display_id: handle  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", fake)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    with shown(True, "a < b", total=4) as report:
        assert report is not None
        clock.advance(2)
        report(0.5)
        clock.advance(1)
    assert pages[-2].startswith('<progress value="0.5000" max="1">')
    assert "a &lt; b: 2/4 images, 1.5 s per image, about 3 s left" in pages[-2]
    assert pages[-1] == ""


def test_the_thread_ends_with_the_block_and_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(_progress, "FIRST_LINE", 0.001)
    with pytest.raises(KeyError), open_display(Console(file=io.StringIO())):
        raise KeyError
    assert not any(thread.name == "weakspot-progress" for thread in threading.enumerate())


IMAGES, LABELS = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])


@pytest.mark.parametrize("progress", ["yes", 1, 0.5], ids=repr)
def test_progress_that_is_neither_a_switch_nor_a_function_is_refused(progress: Any) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3)).eval()
    with pytest.raises(ValueError, match=r"^progress must be True, False, None or a function .*, got"):
        attacks.pgd(model, torch.rand(1, 3, 16, 16), torch.tensor([0]), progress=progress)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: attacks.pgd(model, IMAGES, LABELS, steps=40, batch_size=1, progress=True),
        lambda model: attacks.fmn(model, IMAGES, LABELS, steps=20, batch_size=2, progress=True),
        lambda model: attacks.few_pixel(
            model, IMAGES, LABELS, population=4, generations=20, batch_size=2, progress=True
        ),
        lambda model: weakspot.explain(
            model,
            attacks.pgd(model, IMAGES, LABELS, steps=1, batch_size=2),
            analyses=["cam"],
            progress=True,
        ),
    ],
    ids=["pgd", "fmn", "few_pixel", "explain"],
)
def test_no_call_is_silent_while_a_slow_model_works(
    call: Callable[[nn.Module], object],
    clock: FakeClock,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started = clock.now
    call(Slow(clock, 2.0).eval())
    lines = [line for line in capsys.readouterr().err.splitlines() if "left" in line or "so far" in line]
    # One line after 5 s and one every 30 s of the time in which a bar is open.
    assert len(lines) >= max(1, (clock.now - started) // 60)
    # Whether a rate is known by then depends on when the display's thread looks at the clock.
    assert all(line.startswith(("attacking: ", "explaining: ")) for line in lines)
