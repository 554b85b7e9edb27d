"""What `pip install weakspot` without extras can do, and what it says where an extra is missing."""

from __future__ import annotations

import json
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
import json, sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from weakspot.cli import main
codes = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["weakspot", *arguments]
    try:
        main()
    except SystemExit as end:
        codes.append(end.code)
sys.exit(min(codes))
"""


def commands(*lines: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """`weakspot` with each line of arguments, in a process that cannot import any optional library."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, json.dumps(lines)],
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
    ended = commands(
        [name, str(digits), "--model", "mnist_standard", "--out", str(tmp_path / "out")], cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out").is_dir()


@pytest.mark.slow
def test_missing_extras_are_named_with_their_install_lines(digits: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "digits.npz", images=np.zeros((4, 28, 28), np.uint8), labels=np.arange(4))
    ended = commands(
        ["audit", str(digits), "--out", "out"],
        ["train", "digits.npz", "--out", "out"],
        ["explain", str(digits), "--model", "timm:resnet18", "--out", "out"],
        ["explain", str(digits), "--model", "torchvision:resnet18", "--out", "out"],
        cwd=tmp_path,
    )
    assert ended.returncode != 0  # of each
    for extra in ("audit", "train", "timm", "torchvision"):
        assert f"pip install 'weakspot[{extra}]'" in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
