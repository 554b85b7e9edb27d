"""No command leaves the user without a sign of life: every second of the model's work is inside a display."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.clock import FakeClock
from weakspot import _progress

SLOW = """

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = build()

    def forward(self, images):
        from weakspot import _progress
        _progress.clock.advance(2.0)
        return self.inner(images)
"""
COMMANDS = {
    "explain": ("explain", "photos", "--steps", 2, "--analyses", "cam,overlap"),
    "attack": ("attack", "photos", "--set", "steps=4"),
    "defend": ("defend", "photos", "--steps", 2, "--queries", 2),
    "map": ("map", "photos"),
    "certify": ("certify", "photos", "--colors", "8bit", "--region", "border:1"),
    "dissect": ("dissect", "--demo", "--layer", "inner.0"),
    "audit": ("audit", "photos", "--attacks", "fgsm", "--out", "run", "--no-report"),
    "train": ("train", "photos", "--recipe", "standard", "--epochs", 1, "--batch-size", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_pass_of_a_slow_model_is_inside_a_display(
    run: Run,
    photographs: Path,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setattr(_progress, "FIRST_LINE", 5.0)
    with Path("tiny_networks.py").open("a") as file:
        file.write(SLOW)
    if name == "train":
        for number, image in enumerate(sorted(photographs.iterdir())):
            folder = photographs / "ab"[number % 2]
            folder.mkdir(exist_ok=True)
            for copy in range(6):
                (folder / f"{copy}{image.name}").write_bytes(image.read_bytes())
            image.unlink()
    ended = run(*COMMANDS[name], "--model", "tiny_networks:Slow", "--size", "64x64")
    assert ended.code == 0, ended.err
    assert clock.now > 10
    assert clock.silent == 0
    lines = [line for line in ended.err.splitlines() if " so far" in line or " left" in line]
    assert len(lines) == 1 + (clock.now - 5) // 30
    # Not the name of one step all the time.
    assert clock.now < 100 or len({line.partition(":")[0] for line in lines}) > 1 or " left" in lines[-1]
