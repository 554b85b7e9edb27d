"""Pairs: what does not fit is refused by name, and what is stored comes back bit for bit."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.networks import Made, untouched
from weakspot._checks import ImageWarning, ModelWarning
from weakspot.pairs import AttackResult, Pairs


def fields_of(pairs: Pairs) -> dict[str, Tensor]:
    known = {field.name: getattr(pairs, field.name) for field in dataclasses.fields(pairs)}
    return {name: tensor for name, tensor in known.items() if isinstance(tensor, Tensor)}


def parts(count: int = 3, seed: int = 0) -> dict[str, Any]:
    """What a good Pairs is made of."""
    generator = torch.Generator().manual_seed(seed)
    clean, adversarial = torch.rand(2, count, 3, 5, 7, generator=generator).unbind()
    labels, targets = torch.randint(0, 9, (2, count), generator=generator).unbind()
    return {"clean": clean, "adversarial": adversarial, "labels": labels, "targets": targets}


def results(count: int = 3, seed: int = 0, *, optional: bool = True) -> AttackResult:
    generator = torch.Generator().manual_seed(seed)
    n_forward, n_backward, seeds = torch.randint(0, 99, (3, count), generator=generator).unbind()
    success, success_8bit = (torch.rand(2, count, generator=generator) > 0.5).unbind()
    known: dict[str, Any] = {"success": success, "n_forward": n_forward, "n_backward": n_backward}
    extra: dict[str, Any] = {"success_8bit": success_8bit, "seed": seeds} if optional else {}
    return AttackResult(**parts(count, seed), **known, **extra)


def assert_same(found: Pairs, expected: Pairs) -> None:
    """The same type and, field by field, the same dtype and bits."""
    assert type(found) is type(expected)
    assert fields_of(found).keys() == fields_of(expected).keys()
    assert found.names == expected.names
    for name, tensor in fields_of(expected).items():
        assert getattr(found, name).dtype == tensor.dtype
        assert torch.equal(getattr(found, name), tensor), name


# ---------------------------------------------------------------- construction

REFUSED: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "clean, three-dimensional": ("clean", lambda images: images[0]),
    "clean, NaN": ("clean", lambda images: images.clone().index_fill(0, torch.tensor([1]), torch.nan)),
    "clean, infinity": ("clean", lambda images: images / 0),
    "clean, bytes": ("clean", lambda images: (images * 255).byte()),
    "clean, whole numbers": ("clean", lambda images: images.long()),
    "clean, no pixels": ("clean", lambda images: images[..., :0]),
    "clean, no images": ("clean", lambda images: images[:0]),
    "clean, a list": ("clean", lambda images: images.tolist()),
    "clean, nothing": ("clean", lambda images: None),
    "adversarial, three-dimensional": ("adversarial", lambda images: images[0]),
    "adversarial, NaN": ("adversarial", lambda images: images * torch.nan),
    "adversarial, bytes": ("adversarial", lambda images: (images * 255).byte()),
    "adversarial, other size": ("adversarial", lambda images: images[..., 1:]),
    "adversarial, fewer": ("adversarial", lambda images: images[1:]),
    "adversarial, one channel": ("adversarial", lambda images: images[:, :1]),
    "labels, too few": ("labels", lambda labels: labels[1:]),
    "labels, a column": ("labels", lambda labels: labels[:, None]),
    "labels, floats": ("labels", lambda labels: labels.float()),
    "labels, yes and no": ("labels", lambda labels: labels > 3),
    "labels, complex": ("labels", lambda labels: labels.to(torch.complex64)),
    "labels, negative": ("labels", lambda labels: labels - 9),
    "labels, a list": ("labels", lambda labels: labels.tolist()),
    "targets, too few": ("targets", lambda targets: targets[1:]),
    "targets, floats": ("targets", lambda targets: targets.double()),
    "targets, negative": ("targets", lambda targets: targets - 9),
}


@pytest.mark.parametrize(("name", "spoil"), REFUSED.values(), ids=REFUSED)
def test_invalid_arguments_are_refused_by_name(name: str, spoil: Callable[[Tensor], Any]) -> None:
    good = parts()
    Pairs(**good)
    with pytest.raises(ValueError, match=rf"\b{name}\b.*must ") as refusal:
        Pairs(**{**good, name: spoil(good[name])})
    assert "\n" not in str(refusal.value)


def test_the_error_names_the_image_that_is_not_finite() -> None:
    good = parts()
    good["adversarial"][2, 1, 4, 6] = torch.nan
    with pytest.raises(ValueError, match=r"adversarial must .*\[2\]"):
        Pairs(**good)


def test_pairs_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Pairs(**parts()).labels = torch.zeros(3)  # type: ignore[misc]


def test_the_perturbation_is_adversarial_minus_clean() -> None:
    pairs = Pairs(**parts())
    torch.testing.assert_close(pairs.clean + pairs.perturbation, pairs.adversarial)
    assert torch.equal(
        Pairs(pairs.adversarial, pairs.clean, pairs.targets, pairs.labels).perturbation, -pairs.perturbation
    )
    assert len(pairs) == 3


# ---------------------------------------------------------------- of


def test_labels_and_targets_default_to_predictions(any_model: Made) -> None:
    model, images = any_model
    adversarial = images.flip(0)
    with untouched(model, images, adversarial):
        pairs = Pairs.of(model, images, adversarial)
    with torch.no_grad():
        output = model(images)
    assert torch.equal(pairs.labels, output.argmax(1))
    assert torch.equal(pairs.targets, output.argmax(1).flip(0))
    assert torch.equal(pairs.clean, images)
    assert torch.equal(pairs.adversarial, adversarial)


def test_given_labels_are_used_and_targets_are_predicted(any_model: Made) -> None:
    model, images = any_model
    predicted = Pairs.of(model, images, images.flip(0))
    wrong = 1 - predicted.labels.clamp(0, 1)
    pairs = Pairs.of(model, images, images.flip(0), wrong)
    assert torch.equal(pairs.labels, wrong)
    assert torch.equal(pairs.targets, predicted.targets)


def test_a_pair_does_not_depend_on_its_neighbors(any_model: Made) -> None:
    model, images = any_model
    together = Pairs.of(model, images, images.flip(0))
    for index in range(3):
        alone = Pairs.of(model, images[index, None], images.flip(0)[index, None])
        assert int(alone.labels) == int(together.labels[index])
        assert int(alone.targets) == int(together.targets[index])


def test_pairs_are_detached_from_the_callers_tensors(pooling: Made) -> None:
    model, images = pooling
    asked = images.clone().requires_grad_()
    with untouched(model, images):
        pairs = Pairs.of(model, asked, asked * 0.9)
    assert not any(tensor.requires_grad for tensor in fields_of(pairs).values())
    pairs.clean.zero_()
    assert torch.equal(asked, images)


def test_values_outside_the_unit_range_are_clipped_with_a_warning(pooling: Made) -> None:
    model, images = pooling
    bright = images + 0.2
    with pytest.warns(ImageWarning, match=r"^adversarial span .* to 1\."):
        pairs = Pairs.of(model, images, bright)
    assert torch.equal(pairs.adversarial, bright.clamp(0, 1))
    assert torch.equal(pairs.targets, model(bright.clamp(0, 1)).argmax(1))


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda images: {"adversarial": images[..., 1:]}, "adversarial"),
        (lambda images: {"adversarial": images[1:]}, "adversarial"),
        (lambda images: {"adversarial": images[:, :1]}, "adversarial"),
        (lambda images: {"clean": images[0]}, "clean"),
        (lambda images: {"adversarial": images * torch.nan}, "adversarial"),
        (lambda images: {"labels": torch.tensor([0, 1, 4])}, "labels"),
        (lambda images: {"labels": torch.tensor([0, 1])}, "labels"),
        (lambda images: {"labels": torch.zeros(3)}, "labels"),
        (lambda images: {"labels": [0, 1, 2]}, "labels"),
    ],
)
def test_of_refuses_invalid_arguments_and_does_not_change_the_model(
    pooling: Made, spoil: Callable[[Tensor], dict[str, Any]], name: str
) -> None:
    model, images = pooling
    with untouched(model, images), pytest.raises(ValueError, match=rf"\b{name}\b.*must "):
        Pairs.of(model, **{"clean": images, "adversarial": images, **spoil(images)})


def test_of_refuses_a_label_beyond_the_last_class(pooling: Made) -> None:
    model, images = pooling
    with pytest.raises(ValueError, match="labels must be classes between 0 and 3, got 4"):
        Pairs.of(model, images, images, torch.tensor([0, 4, 1]))
    assert Pairs.of(model, images, images, torch.tensor([0, 3, 1])).labels.tolist() == [0, 3, 1]


def test_of_warns_of_a_model_that_returns_probabilities(pooling: Made) -> None:
    model, images = pooling
    with pytest.warns(ModelWarning, match="as a softmax does"):
        Pairs.of(nn.Sequential(model, nn.Softmax(1)).eval(), images, images)


# ---------------------------------------------------------------- files


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 4), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64, torch.float16])
)
def test_pairs_come_back_bit_for_bit(tmp_path: Path, count: int, seed: int, dtype: torch.dtype) -> None:
    made = parts(count, seed)
    pairs = Pairs(made["clean"].to(dtype), made["adversarial"].to(dtype), made["labels"], made["targets"])
    pairs.save(tmp_path / "pairs.safetensors")
    assert_same(Pairs.load(tmp_path / "pairs.safetensors"), pairs)


def test_the_smallest_numbers_and_the_sign_of_zero_come_back(tmp_path: Path) -> None:
    made = parts()
    made["clean"].view(-1)[:3] = torch.tensor([-0.0, 1e-45, 1.0 - 2**-24])
    pairs = Pairs(**made)
    pairs.save(tmp_path / "pairs.safetensors")
    loaded = Pairs.load(tmp_path / "pairs.safetensors")
    assert torch.equal(loaded.clean.view(torch.int32), pairs.clean.view(torch.int32))


@pytest.mark.parametrize("optional", [True, False])
def test_an_attack_result_comes_back_bit_for_bit_and_is_also_a_file_of_pairs(
    tmp_path: Path, optional: bool
) -> None:
    result = results(optional=optional)
    result.save(tmp_path / "result.safetensors")
    assert_same(AttackResult.load(tmp_path / "result.safetensors"), result)
    assert_same(Pairs.load(tmp_path / "result.safetensors"), Pairs(**parts()))


def test_pairs_cannot_be_loaded_as_an_attack_result(tmp_path: Path) -> None:
    Pairs(**parts()).save(tmp_path / "pairs.safetensors")
    with pytest.raises(
        ValueError, match=r"AttackResult\.save wrote, but lacks success, n_forward, n_backward"
    ):
        AttackResult.load(tmp_path / "pairs.safetensors")


SHARING: dict[str, Callable[[dict[str, Tensor]], Pairs]] = {
    "an unchanged image": lambda made: Pairs(made["clean"], made["clean"], made["labels"], made["targets"]),
    "one class": lambda made: Pairs(made["clean"], made["adversarial"], made["labels"], made["labels"]),
    "views": lambda made: Pairs(
        *torch.stack([made["clean"], made["adversarial"]]), *torch.stack([made["labels"]] * 2)
    ),
    "not contiguous": lambda made: Pairs(
        made["clean"].mT, made["adversarial"].mT, made["labels"], made["targets"]
    ),
    "expanded": lambda made: Pairs(
        made["clean"][:1].expand(3, -1, -1, -1), made["adversarial"], made["labels"], made["targets"]
    ),
    "with gradients": lambda made: Pairs(
        made["clean"].requires_grad_(), made["adversarial"], made["labels"], made["targets"]
    ),
}


@pytest.mark.parametrize("fraction", SHARING.values(), ids=SHARING)
def test_fields_may_share_memory_or_lie_in_any_order(
    tmp_path: Path, fraction: Callable[[dict[str, Tensor]], Pairs]
) -> None:
    pairs = fraction(parts())
    pairs.save(tmp_path / "pairs.safetensors")
    assert_same(Pairs.load(tmp_path / "pairs.safetensors"), pairs)


def test_save_takes_a_string_and_creates_the_folder(tmp_path: Path) -> None:
    pairs = Pairs(**parts())
    pairs.save(f"{tmp_path}/new/folder/pairs.safetensors")
    assert_same(Pairs.load(f"{tmp_path}/new/folder/pairs.safetensors"), pairs)


def test_saving_again_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "pairs.safetensors"
    for seed in (0, 1):
        Pairs(**parts(seed=seed)).save(path)
    assert_same(Pairs.load(path), Pairs(**parts(seed=1)))
    assert list(tmp_path.iterdir()) == [path]


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may grow beyond `room` bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_fails_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "pairs.safetensors"
    Pairs(**parts()).save(path)
    with pytest.raises(OSError, match="File too large"), full_disk(room=1000):
        Pairs(**parts(seed=1)).save(path)
    assert_same(Pairs.load(path), Pairs(**parts()))
    assert os.listdir(tmp_path) == [path.name]  # noqa: PTH208 - hidden files included


def test_a_folder_at_the_path_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "pairs.safetensors"
    folder.mkdir()
    (folder / "kept").write_text("kept")
    with pytest.raises(OSError, match=folder.name):
        Pairs(**parts()).save(folder)
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == [folder.name, "kept"]


def test_a_missing_file_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors does not exist"):
        Pairs.load(tmp_path / "none.safetensors")


def whole_file(folder: Path) -> bytes:
    Pairs(**parts()).save(folder / "whole")
    return (folder / "whole").read_bytes()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda whole: b"",
        lambda whole: b"no pairs at all",
        lambda whole: b"\xff" * 500,
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-1],
        lambda whole: whole + b"more",
        lambda whole: whole.replace(b"F32", b"F99"),
        lambda whole: b"PK\x03\x04" + whole,
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    (tmp_path / "spoilt.safetensors").write_bytes(spoil(whole_file(tmp_path)))
    with pytest.raises(
        ValueError, match=r"spoilt\.safetensors must be .* Pairs\.save wrote, but cannot be read"
    ):
        Pairs.load(tmp_path / "spoilt.safetensors")


def test_a_file_of_other_tensors_is_refused_with_the_missing_names(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"clean": torch.zeros(1, 3, 2, 2), "bias": torch.zeros(3)}, path)
    with pytest.raises(
        ValueError, match=r"weights\.safetensors must be .* but lacks adversarial, labels, targets"
    ):
        Pairs.load(path)


def test_invalid_pairs_in_a_file_are_refused(tmp_path: Path) -> None:
    made = parts()
    save_file({**made, "clean": made["clean"] * torch.nan}, tmp_path / "pairs.safetensors")
    with pytest.raises(ValueError, match=r"clean must .*\[0\]"):
        Pairs.load(tmp_path / "pairs.safetensors")


@pytest.mark.parametrize("optional", [True, False])
def test_moving_to_a_device_keeps_type_and_values(optional: bool) -> None:
    result = results(optional=optional)
    assert_same(result.to("cpu"), result)


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("channels", [1, 3])
def test_distances_are_numpys_norms_and_scikit_images_ssim(channels: int) -> None:
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    generator = torch.Generator().manual_seed(1)
    clean = torch.rand(3, channels, 24, 17, generator=generator)
    noise = 0.1 * torch.randn(clean.shape, generator=generator)
    adversarial = torch.where(
        torch.rand(3, 1, 24, 17, generator=generator) < 0.3, clean + noise, clean
    ).clamp(0, 1)
    adversarial[1] = clean[1]
    table = Pairs(clean, adversarial, torch.arange(3), torch.arange(3)).distances
    assert list(table.columns) == ["linf", "l2", "l1", "pixels", "ssim_windowed", "ssim_windowed_min"]
    weights = np.array([0.299, 0.587, 0.114]) if channels == 3 else np.ones(1)
    for index in range(3):
        pair = (clean[index].double().numpy(), adversarial[index].double().numpy())
        moved = pair[1] - pair[0]
        first, second = (np.tensordot(weights, image, 1) for image in pair)
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
        everywhere = structural_similarity(first, second, full=True, **options)[1]
        expected = {
            "linf": np.abs(moved).max(),
            "l2": np.linalg.norm(moved.ravel(), 2),
            "l1": np.linalg.norm(moved.ravel(), 1),
            "pixels": (moved != 0).any(0).sum(),
            "ssim_windowed": everywhere.mean(),
            "ssim_windowed_min": everywhere.min(),
        }
        for name, value in expected.items():
            assert table[name][index] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    assert table.iloc[1].tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("optional", [True, False])
def test_a_table_has_every_known_field_and_the_distances_one_row_per_image(optional: bool) -> None:
    result = results(optional=optional)
    table, distances = result.table, result.distances
    fields = {"label": result.labels, "target": result.targets, "success": result.success}
    fields |= {"n_forward": result.n_forward, "n_backward": result.n_backward}
    if result.success_8bit is not None and result.seed is not None:
        fields |= {"success_8bit": result.success_8bit, "seed": result.seed}
    assert set(table.columns) == fields.keys() | set(distances.columns)
    for name, tensor in fields.items():
        assert table[name].tolist() == tensor.tolist()
    for name in distances.columns:
        assert table[name].tolist() == distances[name].tolist()


def test_results_print_in_one_line() -> None:
    text = repr(results(optional=True))
    assert re.fullmatch(
        r"AttackResult\(\d+ x \d+ x \d+ x \d+ on cpu, largest change \S+, \d+ of \d+ successful, "
        r"\d+ forward and \d+ backward passes\)",
        text,
    ), text
    assert repr(Pairs(**parts())).startswith("Pairs(")
    assert "tensor" not in text


# ---------------------------------------------------------------- parts of pairs, and names

INDICES: dict[str, tuple[Any, list[int]]] = {
    "a number": (2, [2]),
    "a negative number": (-1, [3]),
    "a numpy number": (np.int64(1), [1]),
    "a tensor of one number": (torch.tensor(2), [2]),
    "a slice": (slice(None, 2), [0, 1]),
    "a backward slice": (slice(None, None, -1), [3, 2, 1, 0]),
    "an empty slice": (slice(2, 2), []),
    "a list": ([3, 0, 0], [3, 0, 0]),
    "a tensor": (torch.tensor([1, -1]), [1, 3]),
    "a mask": (torch.tensor([True, False, True, False]), [0, 2]),
    "a list of bools": ([False, True, False, False], [1]),
    "a name": ("coffee", [1]),
    "names": (["rocket", "cat"], [2, 0]),
}
NAMES = ("cat", "coffee", "rocket", "bike")


@pytest.mark.parametrize(("index", "rows"), INDICES.values(), ids=INDICES)
@pytest.mark.parametrize("kind", [Pairs, AttackResult])
def test_a_part_of_pairs_has_the_fields_of_its_rows(kind: type[Pairs], index: Any, rows: list[int]) -> None:
    whole = (results(4) if kind is AttackResult else Pairs(**parts(4))).named(NAMES)
    if not rows:
        with pytest.raises(ValueError, match="must hold at least one pixel"):
            whole[index]
        return
    part = whole[index]
    assert type(part) is kind
    assert part.names == tuple(NAMES[row] for row in rows)
    assert fields_of(part).keys() == fields_of(whole).keys()
    for name, value in fields_of(whole).items():
        if isinstance(value, Tensor):
            assert torch.equal(getattr(part, name), torch.stack([value[row] for row in rows])), name


def test_pairs_are_iterated_one_by_one() -> None:
    whole = results(3).named(NAMES[:3])
    assert [part.names for part in whole] == [("cat",), ("coffee",), ("rocket",)]  # type: ignore[attr-defined]
    assert whole[1:][0].names == ("coffee",)
    assert AttackResult.concatenate([whole[:1], whole[1:]]).names == whole.names
    assert AttackResult.concatenate([whole[:1], results(2)]).names == ()
    with pytest.raises(ValueError, match="results must have at least one result, got none"):
        AttackResult.concatenate([])


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (9, IndexError, r"index must be from -4 to 3, got 9"),
        (-5, IndexError, r"index must be from -4 to 3, got -5"),
        ([0, 4], IndexError, "got 4"),
        (1.5, IndexError, "must be indexed by numbers, a slice, a mask or names, got float"),
        (True, IndexError, "must be indexed by"),
        (torch.tensor(1.5), IndexError, "must be indexed by"),
        (torch.tensor([[0]]), IndexError, "index must be the number or the name of a pair"),
        ([0.5], IndexError, "index must be the number or the name of a pair, got 0.5"),
        (torch.tensor([True, False]), IndexError, "a mask of 4 pairs must have as many entries, got 2"),
        (
            "cofee",
            ValueError,
            "name must be one of cat, coffee, rocket, bike, got 'cofee' .did you mean 'coffee'",
        ),
    ],
)
def test_an_index_that_fits_no_pair_is_one_sentence(index: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        results(4).named(NAMES)[index]
    assert "\n" not in str(caught.value)


def test_names_that_do_not_fit_or_decide_are_refused() -> None:
    with pytest.raises(ValueError, match="names must have one entry for each of 3 pairs, got 2"):
        Pairs(**parts(3)).named(["a", "b"])
    with pytest.raises(ValueError, match=r"name must be that of one pair, got 'a' of pairs \[0, 2\]"):
        Pairs(**parts(3)).named(["a", "b", "a"])["a"]
    with pytest.raises(ValueError, match=r"give the pairs names with pairs\.named"):
        Pairs(**parts(3))["a"]


def test_names_are_stored_with_the_pairs(tmp_path: Path) -> None:
    for pairs in (Pairs(**parts(3)), results(3)):
        for names in ((), ("a.png", ":smile: \u00fc", "")):
            pairs.named(names).save(tmp_path / "pairs.safetensors")
            again = type(pairs).load(tmp_path / "pairs.safetensors")
            assert again.names == names
            assert_same(again, pairs.named(names))


@pytest.mark.parametrize(
    "about", [None, {"weakspot": "pairs 1"}, {"weakspot": '{"names": 3}'}, {"weakspot": "[" * 9999}]
)
def test_files_without_names_are_read(tmp_path: Path, about: dict[str, str] | None) -> None:
    save_file(parts(3), tmp_path / "pairs.safetensors", about)
    assert Pairs.load(tmp_path / "pairs.safetensors").names == ()


def test_names_for_another_number_of_images_are_ignored(tmp_path: Path) -> None:
    save_file(parts(3), tmp_path / "pairs.safetensors", {"weakspot": '{"names": ["a"]}'})
    assert Pairs.load(tmp_path / "pairs.safetensors").names == ()


WRONG_FIELDS: dict[str, Any] = {
    "success": torch.tensor([0, 1, 1]),
    "n_forward": torch.tensor([4, 4]),
    "n_backward": [1, 2, 3],
    "success_8bit": torch.tensor([[True, False, True]]),
    "seed": torch.tensor([0.5, 1, 1]),
    "ssim_budget_spent": torch.tensor(0.01),
    "ssim_local_budget_spent": torch.tensor([1, 2, 3]),
}


@pytest.mark.parametrize("name", WRONG_FIELDS)
def test_an_attack_result_has_an_entry_of_the_right_kind_for_each_pair(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^{name} must be an? \w+ tensor of shape \(3,\), one entry per pair, got"
    ):
        dataclasses.replace(results(), **{name: WRONG_FIELDS[name]})


def test_no_pairs_have_no_distances_and_no_numbers() -> None:
    fields: dict[str, Any] = {name: tensor[:0] for name, tensor in fields_of(results()).items()}
    none = AttackResult(**fields)
    assert none.distances.columns.tolist() == results().distances.columns.tolist()
    assert none.distances.dtypes.tolist() == results().distances.dtypes.tolist()
    assert none.table.columns.tolist() == results().table.columns.tolist()
    assert (len(none.distances), len(none.table)) == (0, 0)
    with pytest.raises(
        IndexError, match=r"^index must be the number of a pair, got 0 \(there are no pairs\)$"
    ):
        none[0]


def test_a_folder_is_not_loaded_and_does_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be a file that Pairs.save wrote, got a folder$"):
        Pairs.load(tmp_path)
