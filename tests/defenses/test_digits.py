"""Verdicts on real networks: "protects" for genuine defenses of digits, never for broken ones."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.defenses.digits import NAMES, PROTECTS, Case, cases
from weakspot.budgets import Linf
from weakspot.defenses import evaluate_defense, verdict

TITLES = tuple(cases(dict.fromkeys(NAMES, torch.nn.Identity()), torch.zeros(0)))
IMAGES = slice(100, 140)
MANY = {"convex training (.1)"}  # a small gain, which needs more images to show


@pytest.fixture
def digits(data: Path) -> Any:
    """The data folder's module of networks and pictures."""
    spec = importlib.util.spec_from_file_location("networks", data / "networks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.data
@pytest.mark.parametrize("title", TITLES)
def test_broken_defenses_are_not_praised_and_genuine_ones_are(title: str, digits: Any) -> None:
    nets = {short: digits.network(name) for short, name in NAMES.items()}
    case: Case = cases(nets, digits.mnist("train", 2000)[0])[title]
    wanted = slice(100, 200) if title in MANY else IMAGES
    images, labels = (tensor[wanted] for tensor in digits.mnist("test", wanted.stop))
    table = evaluate_defense(
        nets["nat"], case.build().eval(), images, labels, budget=Linf(case.eps),
        queries=4000 if PROTECTS in case.statuses else 1000,
    )  # fmt: skip
    result = verdict(table)
    assert result.status in case.statuses, f"{result}\n{table}"
    masked = "Its own gradients are masked" in str(result)
    assert masked == (title == "detach, robust network")
    assert (result.status == PROTECTS) == str(result).startswith("Protects against these attacks")
