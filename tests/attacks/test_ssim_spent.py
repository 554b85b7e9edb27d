"""The quantity that an SSIM budget bounds and the one that windows show have two names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.networks import Made
from weakspot import L2, SSIM, AttackResult, Linf, attacks, ssim_map

NAMES = ("ssim_budget_spent", "ssim_local_budget_spent")


def distances(clean: Tensor, adversarial: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """d1^2 and d2^2 of every patch of every channel (N, patches), written out; borders are cut."""
    found: list[list[Tensor]] = [[], []]
    for top in range(0, clean.shape[2], patch):
        for left in range(0, clean.shape[3], patch):
            part = (..., slice(top, top + patch), slice(left, left + patch))
            x, y = clean[part].double().flatten(2), adversarial[part].double().flatten(2)
            mx, my = x.mean(2), y.mean(2)
            x, y = x - mx[..., None], y - my[..., None]
            found[0].append((mx - my).square() / (mx.square() + my.square() + 0.01**2))
            bound = x.square().sum(2) + y.square().sum(2) + (x.shape[2] - 1) * 0.03**2
            found[1].append((x - y).square().sum(2) / bound.clamp(min=1e-20))
    first, second = (torch.cat(parts, 1) for parts in found)
    return first, second


@pytest.mark.parametrize("run", [attacks.fgsm, attacks.bim, attacks.pgd], ids=lambda run: run.__name__)
@pytest.mark.parametrize("mode", ["global", "local"])
def test_the_spent_budget_is_its_definition_and_no_mean_over_windows(
    pooling: Made, run: Callable[..., AttackResult], mode: str
) -> None:
    model, images = pooling
    labels = model(images).argmax(1)
    result = run(model, images, labels, budget=SSIM(0.02, patch=6, mode=mode))
    first, second = distances(result.clean, result.adversarial, 6)
    expected = (first + second).mean(1) if mode == "global" else torch.maximum(first, second).amax(1)
    own, other = NAMES if mode == "global" else NAMES[::-1]
    spent = getattr(result, own)
    torch.testing.assert_close(spent.double(), expected, rtol=1e-3, atol=1e-7)
    assert getattr(result, other) is None
    assert float(spent.max()) <= 0.02 * 1.0001
    table, windows = result.table, ssim_map(result.clean, result.adversarial).flatten(1)
    assert own in table
    assert other not in table
    torch.testing.assert_close(torch.tensor(table["ssim_windowed"]).float(), windows.mean(1))
    torch.testing.assert_close(torch.tensor(table["ssim_windowed_min"]).float(), windows.amin(1))
    assert "ssim" not in table


def test_other_budgets_spend_none_and_the_spent_budget_is_saved(pooling: Made, tmp_path: Path) -> None:
    model, images = pooling
    labels = model(images).argmax(1)
    for budget in (Linf(0.03), L2(0.5)):
        result = attacks.pgd(model, images, labels, budget=budget, steps=2)
        assert [getattr(result, name) for name in NAMES] == [None, None]
        assert not set(NAMES) & set(result.table)
    result = attacks.pgd(model, images, labels, budget=SSIM(0.01), steps=2)
    assert result.ssim_budget_spent is not None
    result.save(tmp_path / "pairs.safetensors")
    halves = [result[rows] for rows in ([0, 1], [2])]
    for again in (AttackResult.load(tmp_path / "pairs.safetensors"), AttackResult.concatenate(halves)):
        assert again.ssim_budget_spent is not None
        assert torch.equal(again.ssim_budget_spent, result.ssim_budget_spent)
        assert again.ssim_local_budget_spent is None
