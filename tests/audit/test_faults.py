"""Faults of models and attacks: an error of the image, a remark on the model, never a crash or an open gate."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import weakspot
from tests.audit.fixtures import NETWORKS, networks, pictures, same_maps, same_records, small_plan
from weakspot import Classifier, attacks
from weakspot._errors import ModelError
from weakspot.attacks import Attack
from weakspot.audit import (
    AttackPlan,
    AuditProgress,
    Plan,
    audit,
    compare,
    resume,
    summarize,
    write_run_report,
)
from weakspot.audit.execution import attacked_groups
from weakspot.audit.findings.gates import judge
from weakspot.audit.findings.summary import cell_table, unknown_cases
from weakspot.models import load
from weakspot.models.identity import CHANGED, DRIFTED, RANDOM, Watch, probe, read_probe
from weakspot.pairs import AttackResult

__all__ = ["networks", "pictures"]  # fixtures
PGD = AttackPlan("pgd", settings=(("steps", 2),))
ODD = """
import random
import numpy as np
from torch.nn import functional as F


class Odd(Tiny):
    # Raises on dark images, or applies a function to its logits.
    def __init__(self, error=None, act=None):
        super().__init__()
        self.error, self.act, self.calls = error, act, 0
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, images):
        self.calls += 1
        if self.error is not None and bool((images.mean((1, 2, 3)) < 0.05).any()):
            raise self.error
        logits = super().forward(images)
        return logits if self.act is None else self.act(self, images, logits)


class Flat(Tiny):
    # Also raises on the probe images, which have strong contrasts.
    def forward(self, images):
        if bool((images.std((1, 2, 3)) > 0.2).any()):
            raise RuntimeError("not flat")
        return super().forward(images)


def flat():
    network = Flat()
    network.load_state_dict(build().state_dict())
    return network.eval()


class Odder(BaseException):
    pass


def made(error=None, act=None):
    network = Odd(error, act)
    network.load_state_dict(build().state_dict(), strict=False)
    return network.eval()


def plain(): return made()
def scaled(): return made(act=lambda self, images, logits: 3 * logits)
def slightly(): return made(act=lambda self, images, logits: 1.01 * logits)
def rounded(): return made(act=lambda self, images, logits: logits * (1 + 1e-5))
def runtime(): return made(RuntimeError("odd image"))
def exits(): return made(SystemExit(0))
def missing(): return made(FileNotFoundError(2, "No such file", "cache.bin"))
def memory(): return made(MemoryError("out of memory"))
def strange(): return made(Odder("odd"))
def dropout(): return made(act=lambda self, images, logits: F.dropout(logits, 0.5, training=True))
def numpy_noise(): return made(act=lambda self, images, logits: logits + np.random.default_rng().normal())
def drifting(): return made(act=lambda self, images, logits: logits * (1 + self.calls // 30))


def count(self, images, logits):
    self.seen += len(images)
    return logits


def counting(): return made(act=count)


def leaves():
    raise SystemExit(0)
"""


@pytest.fixture
def odd(pictures: Path) -> Path:
    """The pictures, one of them dark, and networks that fail on it."""
    (pictures.parent / "audited_networks.py").write_text(NETWORKS + ODD)
    Image.new("RGB", (24, 24), (3, 3, 3)).save(pictures / "dog/dark.png")
    return pictures


def plan_of(odd: Path, factory: str, **changes: Any) -> Plan:
    plan = small_plan(odd, **{"attacks": (PGD,), "analyses": (), "regions": ("none",), **changes})
    return replace(plan, model=replace(plan.model, spec=f"audited_networks:{factory}"))


# --- one image


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("runtime", "RuntimeError: odd image"),
        ("exits", "ModelError: Odd raised SystemExit: 0; a model must not end the process"),
        ("missing", "FileNotFoundError: [Errno 2] No such file: 'cache.bin'"),
        ("memory", "MemoryError: out of memory (with 1 image at a time)"),
        ("strange", "ModelError: Odd raised Odder: odd; a model must not end the process"),
    ],
)
def test_an_exception_of_the_model_is_an_error_in_the_row(odd: Path, factory: str, reason: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = audit(plan_of(odd, factory), odd.parent / "found")
    assert run.complete
    records = run.records
    assert len(records) == 15
    (row,) = records[records["error"].notna()].itertuples()
    assert (row.image, row.error) == ("dog/dark.png", f"a pass through Odd: {reason}")
    assert records["success"].isna().sum() == 1
    expected = audit(plan_of(odd, "plain"), odd.parent / "expected").records
    others = expected["image"] != "dog/dark.png"
    np.testing.assert_allclose(
        records.loc[others, "margin_clean"], expected.loc[others, "margin_clean"], atol=1e-5
    )
    assert resume(run.folder).complete


def raising(when: int, error: BaseException) -> Any:
    """PGD that raises on batches with an image of this mean gray level."""

    def attack(model: nn.Module, images: Tensor, labels: Tensor, **options: Any) -> AttackResult:
        if bool(((images.mean((1, 2, 3)) * 255).round() == when).any()):
            raise error
        return attacks.pgd(model, images, labels, **options)

    return attack


@pytest.mark.parametrize("error", [KeyError("odd"), SystemExit(0), OSError("odd"), RecursionError("odd")])
def test_an_exception_of_attack_or_analysis_is_an_error_in_the_row(
    odd: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attacked_groups, "find_attack", lambda name: Attack.of(name, raising(3, error)))
    own = weakspot.explain

    def explaining(model: nn.Module, pairs: AttackResult, **options: Any) -> Any:
        if bool((pairs.clean.mean((1, 2, 3)) > 0.9).any()):
            raise error
        return own(model, pairs, **options)

    monkeypatch.setattr(attacked_groups, "explain", explaining)
    Image.new("RGB", (24, 24), (250, 250, 250)).save(odd / "cat/bright.png")
    run = audit(plan_of(odd, "plain", analyses=("ssim",)), odd.parent / "found")
    assert run.complete
    errors = run.records.set_index("image")["error"].dropna()
    assert set(errors.index) == {"dog/dark.png", "cat/bright.png"}
    assert errors["dog/dark.png"].startswith("attack pgd in region none: ")
    assert errors["cat/bright.png"].startswith("analyses ssim: ")
    assert run.records.set_index("image")["success"].isna().tolist().count(True) == 1


def test_a_shard_of_failing_images_does_not_stop_the_audit_and_shuts_gates(odd: Path) -> None:
    for number in range(8):
        Image.new("RGB", (24, 24), (number % 4, 3, 3)).save(odd / f"cat/0-{number}.png")
    run = audit(plan_of(odd, "runtime"), odd.parent / "found")
    assert run.complete
    assert run.records["error"].notna().sum() == 9
    assert resume(run.folder).complete
    # The other images alone would pass these gates.
    summary = summarize(run)
    rows, robust = cell_table(run, summary), summary.cells[0].robust_accuracy
    for condition, shut in (
        (f"robust_accuracy < {robust - 0.01}", True),  # the nine may have been fooled
        (f"robust_accuracy > {robust + 0.01}", True),  # or not
        (f"clean_accuracy < {summary.clean_accuracy - 0.01}", True),
        (f"robust_accuracy < {robust * 14 / 23 - 0.01}", False),
        ("images < 14", False),
    ):
        (alone,) = judge([condition], rows, str)
        (verdict,) = judge([condition], rows, str, others=unknown_cases(run, rows))
        assert not alone.failed
        assert verdict.failed == shut, verdict


def test_a_model_that_raises_on_probe_images_is_audited(networks: Path) -> None:
    (networks / "audited_networks.py").write_text(NETWORKS + ODD)
    rng = np.random.default_rng(0)
    for number in range(6):
        noise = rng.integers(0, 256 if number == 2 else 9, (24, 24, 3), dtype=np.uint8)
        (networks / "flat").mkdir(exist_ok=True)
        Image.fromarray(noise).save(networks / f"flat/{number}.png")
    run = audit(plan_of(networks / "flat", "flat", shard=2), networks / "found")
    assert run.records["success"].isna().tolist() == [False, False, True, False, False, False]
    assert run.remarks == ()
    alone = audit(plan_of(networks / "flat/2.png", "flat"), networks / "alone")
    assert alone.records["error"].tolist() == ["a pass through Flat: RuntimeError: not flat"]


@pytest.mark.parametrize("size", [None, 1])
def test_an_attack_that_also_fails_on_neutral_images_stops_the_audit(
    odd: Path, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attack(*_: Any, **__: Any) -> AttackResult:
        raise ValueError("no such norm")

    monkeypatch.setattr(attacked_groups, "find_attack", lambda name: Attack.of(name, attack))
    with pytest.raises(
        ValueError, match=r"attack pgd in region none: no such norm \(the same on every image"
    ):
        audit(plan_of(odd, "plain"), odd.parent / "found")


# --- the process


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit(None), GeneratorExit(), BaseException("x")])
def test_a_model_cannot_end_the_process(error: BaseException) -> None:
    class Leaving(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise error

    with pytest.raises(ModelError, match=f"Leaving raised {type(error).__name__}"):
        Classifier.wrap(Leaving().eval())(torch.zeros(1, 3, 2, 2))

    def factory() -> nn.Module:
        raise error

    with pytest.raises(ModelError, match="the model's factory raised"):
        load(factory)


def test_keyboard_interrupts_pass_through() -> None:
    class Interrupted(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Classifier.wrap(Interrupted().eval())(torch.zeros(1, 3, 2, 2))


# --- which model


def interrupted(plan: Plan, out: Path, factory: str) -> Path:
    """An audit interrupted after one shard, whose run.json then names another model."""

    def watch(progress: AuditProgress) -> None:
        if progress.done > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(plan, out, watch=watch)
    about = json.loads((out / "run.json").read_text())
    about["plan"]["model"]["spec"] = f"audited_networks:{factory}"
    (out / "run.json").write_text(json.dumps(about))
    return out


@pytest.mark.parametrize("factory", ["scaled", "slightly", "dropout"])
def test_an_audit_does_not_continue_with_other_logits(odd: Path, factory: str) -> None:
    out = interrupted(plan_of(odd, "plain"), odd.parent / "found", factory)
    with pytest.raises(
        ValueError, match=r"has the same weights .* but returns other logits, so its code"
    ) as raised:
        resume(out)
    assert "\n" not in str(raised.value)


def test_rounding_differences_are_the_same_model(odd: Path) -> None:
    out = interrupted(plan_of(odd, "plain"), odd.parent / "found", "rounded")
    assert resume(out).complete


def test_another_normalization_is_another_model() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    one, other = (
        Classifier.wrap(network, mean=[mean], std=[0.25], input_size=(2, 2)) for mean in (0.5, 0.48)
    )
    assert probe(one).agrees(read_probe(json.loads(json.dumps(probe(one).as_mapping()))))
    assert not probe(one).agrees(probe(other))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_the_tolerance_scales_with_the_spread_of_the_logits(scale: float, shift: float) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).double().eval()

    class Moved(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.base, self.factor = base, factor

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.base(images)
            return scale * (logits * self.factor + shift)

    factors = (1, 1.00002, 1.01 if shift else 1.001)
    same, close, other = (
        probe(Classifier.wrap(Moved(factor).eval(), input_size=(2, 2))) for factor in factors
    )
    assert same.agrees(close)
    assert not same.agrees(other)
    assert not replace(same, logits=same.logits * np.nan).agrees(same)
    assert replace(same, device="cuda").agrees(close)


def test_probing_changes_neither_model_nor_random_state(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout(), nn.Linear(12, 3))
    state = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    seeds_of_other_devices: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds_of_other_devices.append)
    with pytest.warns(UserWarning, match="train mode"):
        assert Watch(Classifier.wrap(network, input_size=(2, 2))).probe.repeats
    assert seeds_of_other_devices == []
    assert network.training
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


@pytest.mark.filterwarnings("ignore:the gradient of Odd is zero everywhere for some images")
@pytest.mark.parametrize(
    ("factory", "sentence"),
    [
        ("dropout", RANDOM),
        ("numpy_noise", RANDOM),
        ("counting", CHANGED),
        ("drifting", DRIFTED),
        ("plain", None),
    ],
)
def test_a_model_that_changes_is_remarked(odd: Path, factory: str, sentence: str | None) -> None:
    changes = {"regions": ("none", "cam"), "analyses": ("overlap",)} if sentence is None else {}
    run = audit(plan_of(odd, factory, **changes), odd.parent / "found")
    expected = () if sentence is None else (sentence,)
    # Dropout may leave an image without gradients, which is a remark of its own.
    remarks = [text for text in run.remarks if "is zero everywhere for some images" not in text]
    assert tuple(remarks) == expected
    assert summarize(run).remarks == run.remarks
    assert json.loads((run.folder / "run.json").read_text())["remarks"] == list(run.remarks)
    if sentence is None:
        return
    assert f"{run.name}: {sentence}" in compare(run, run).remarks
    if sentence == CHANGED:
        assert CHANGED in write_run_report(run, odd.parent / "page.html").read_text()


def test_a_comparison_remarks_other_logits_of_the_same_weights(odd: Path) -> None:
    plain, scaled = (audit(plan_of(odd, name), odd.parent / name) for name in ("plain", "scaled"))
    assert (
        "both runs use the same weights, but the model computes something else with them"
        in compare(plain, scaled).remarks
    )
    assert "both runs use the same weights" in compare(plain, plain).remarks


def test_a_worker_sends_an_exit_as_an_error() -> None:
    from weakspot.audit.execution.ray_worker import _sendable

    sent = _sendable(SystemExit(0))
    assert (type(sent), str(sent)) == (RuntimeError, "SystemExit: 0")


def test_maps_of_failed_images_are_missing(odd: Path) -> None:
    run = audit(plan_of(odd, "runtime"), odd.parent / "found")
    place = run.records["image"].tolist().index("dog/dark.png")
    assert (run.maps["adversarial"][place] == 255).all()
    again = audit(plan_of(odd, "runtime"), odd.parent / "again")
    same_records(run, again)
    same_maps(run, again)
