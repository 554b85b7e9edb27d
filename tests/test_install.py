"""What `pip install weakspot` without extras can do, and what it says where an extra is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXTRAS = (
    "altair", "duckdb", "pyarrow", "vl_convert", "zarr", "lightning", "lightning_fabric", "ray", "datasets", "timm",
    "torchvision", "transformers",
)  # fmt: skip
WITHOUT_EXTRAS = f"""
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from weakspot.cli import main
sys.argv[0] = "weakspot"
main()
"""


def command(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`weakspot` in a process that cannot import any optional library."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    for index in range(2):
        pixels = np.zeros((28, 28), np.uint8)
        pixels[4:24, 12 + index : 16 + index] = 255  # a one
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["explain", "attack"])
def test_the_core_explains_and_attacks(digits: Path, name: str, tmp_path: Path) -> None:
    ended = command(name, digits, "--model", "mnist_standard", "--out", tmp_path / "out", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    ("arguments", "install"),
    [
        (("audit",), "pip install 'weakspot[audit]'"),
        (("train", "digits.npz"), "pip install 'weakspot[train]'"),
        (("explain", "--model", "timm:resnet18"), "pip install 'weakspot[timm]'"),
        (("explain", "--model", "torchvision:resnet18"), "pip install 'weakspot[torchvision]'"),
    ],
    ids=["audit", "train", "timm", "torchvision"],
)
def test_a_missing_extra_is_named_with_its_install_line(
    digits: Path, arguments: tuple[str, ...], install: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "digits.npz", images=np.zeros((4, 28, 28), np.uint8), labels=np.arange(4))
    first: tuple[str | Path, ...] = (
        arguments if arguments[0] == "train" else (arguments[0], digits, *arguments[1:])
    )
    ended = command(*first, "--out", tmp_path / "out", cwd=tmp_path)
    assert ended.returncode != 0
    assert install in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
