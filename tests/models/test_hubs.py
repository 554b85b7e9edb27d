"""Hubs: a directory of Hugging Face transformers gives its network, and never runs what a stranger put in it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weakspot._checks import ModelWarning
from weakspot.models import load

transformers = pytest.importorskip("transformers")

LABELS = {0: "cat", 1: "dog", 2: "cup"}


def tiny_vit(**options: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    network: nn.Module = ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=16,
            patch_size=4,
            **options,
        )
    )
    return network


def tiny_resnet(**options: Any) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    network: nn.Module = ResNetForImageClassification(ResNetConfig(**sizes, **options))
    return network


def saved(
    folder: Path, build: Callable[..., nn.Module], how: dict[str, Any] | None, **options: Any
) -> nn.Module:
    """A network in `folder`, as save_pretrained writes it, with what `how` says of preprocessing."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(**options).eval()
    for parameter in network.parameters():
        parameter.data.add_(0.05)  # off what initialization gives, so that only the file can be the source
    network.save_pretrained(folder)  # type: ignore[operator]
    if how is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(how))
    return network


NORMALIZED: dict[str, Any] = {
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.25],
    "size": {"height": 16, "width": 16},
}


def normalized(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(NORMALIZED[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    return (images - mean) / std


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("build", [tiny_vit, tiny_resnet])
def test_a_saved_network_gives_its_logits_on_images_normalized_as_its_preprocessor_says(
    tmp_path: Path, images: Tensor, build: Callable[..., nn.Module]
) -> None:
    original = saved(
        tmp_path, build, NORMALIZED, id2label=LABELS, label2id={name: i for i, name in LABELS.items()}
    )
    classifier = load(f"hf:{tmp_path}", device="cpu")
    expected = original(pixel_values=normalized(images)).logits
    torch.testing.assert_close(classifier(images), expected)
    assert not torch.allclose(original(pixel_values=images).logits, expected, atol=1e-3)
    assert classifier.class_names == ("cat", "dog", "cup")
    assert classifier.input_size == (16, 16)
    assert not any(module.training for module in classifier.modules())


def test_gradients_flow_through_a_saved_network(tmp_path: Path, images: Tensor) -> None:
    original = saved(tmp_path, tiny_vit, NORMALIZED, num_labels=3)
    asked = images.clone().requires_grad_()
    (found,) = torch.autograd.grad(load(f"hf:{tmp_path}", device="cpu")(asked)[:, 0].sum(), asked)
    (expected,) = torch.autograd.grad(original(pixel_values=normalized(asked)).logits[:, 0].sum(), asked)
    torch.testing.assert_close(found, expected)
    assert bool((found.flatten(1) != 0).any(1).all())


def test_a_preprocessor_that_does_not_normalize_is_followed(tmp_path: Path, images: Tensor) -> None:
    original = saved(tmp_path, tiny_vit, {**NORMALIZED, "do_normalize": False}, num_labels=3)
    classifier = load(f"hf:{tmp_path}", device="cpu")
    torch.testing.assert_close(classifier(images), original(pixel_values=images).logits)


@pytest.mark.parametrize("content", [None, "", "{ no json", "[]", "3"])
def test_without_a_preprocessor_a_warning_says_that_nothing_is_normalized(
    tmp_path: Path, images: Tensor, content: str | None
) -> None:
    original = saved(tmp_path, tiny_vit, None, num_labels=3)
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.warns(ModelWarning, match=r"no preprocessor_config\.json with a normalization"):
        classifier = load(f"hf:{tmp_path}", device="cpu")
    torch.testing.assert_close(classifier(images), original(pixel_values=images).logits)
    assert classifier.input_size == (16, 16)


def test_a_preprocessor_that_does_not_say_how_to_normalize_is_warned_of(
    tmp_path: Path, images: Tensor
) -> None:
    original = saved(tmp_path, tiny_vit, {"size": 16}, num_labels=3)
    with pytest.warns(ModelWarning, match="images are not normalized"):
        classifier = load(f"hf:{tmp_path}", device="cpu")
    torch.testing.assert_close(classifier(images), original(pixel_values=images).logits)


@pytest.mark.parametrize("how", [NORMALIZED, None], ids=["preprocessor", "no preprocessor"])
def test_mean_and_std_that_are_given_go_before_the_preprocessors(
    tmp_path: Path, images: Tensor, how: dict[str, Any] | None
) -> None:
    """Nor is there a warning that images are not normalized, which would be an error here."""
    original = saved(tmp_path, tiny_vit, how, num_labels=3)
    classifier = load(f"hf:{tmp_path}", device="cpu", mean=[0.1], std=[0.9])
    torch.testing.assert_close(classifier(images), original(pixel_values=(images - 0.1) / 0.9).logits)


def test_labels_that_are_only_numbers_are_no_class_names(tmp_path: Path) -> None:
    saved(tmp_path, tiny_vit, NORMALIZED, num_labels=3)
    classifier = load(f"hf:{tmp_path}", device="cpu")
    assert classifier.class_names == ()
    assert classifier.class_name(2) == "class 2"


def test_more_than_ten_classes_keep_their_order(tmp_path: Path) -> None:
    names = {index: f"kind {index}" for index in range(12)}
    saved(
        tmp_path,
        tiny_vit,
        NORMALIZED,
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    assert load(f"hf:{tmp_path}", device="cpu").class_names == tuple(names.values())


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"size": {"height": 20, "width": 24}}, (20, 24)),
        ({"size": {"shortest_edge": 28}}, (28, 28)),
        ({"size": 18}, (18, 18)),
        ({"size": {"shortest_edge": 28}, "crop_size": {"height": 24, "width": 20}}, (24, 20)),
        ({"size": {"shortest_edge": 28}, "crop_size": 24}, (24, 24)),
        ({"size": {"height": 20, "width": 24}, "crop_size": None}, (20, 24)),
        ({"size": None}, (16, 16)),
        (
            {
                "size": {"shortest_edge": 28},
                "crop_size": {"height": 24, "width": 20},
                "do_center_crop": False,
            },
            (28, 28),
        ),
    ],
)
def test_pictures_are_brought_to_the_size_the_preprocessor_says(
    tmp_path: Path, sizes: dict[str, Any], expected: tuple[int, int]
) -> None:
    saved(tmp_path, tiny_vit, {**NORMALIZED, **sizes}, num_labels=3)
    assert load(f"hf:{tmp_path}", device="cpu").input_size == expected


# ---------------------------------------------------------------- what is refused


class Malicious:
    """A pickle that opens a file as soon as it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.trace), "w")


def test_weights_that_need_unpickling_are_refused_and_do_not_run(tmp_path: Path) -> None:
    folder, trace = tmp_path / "pickled", tmp_path / "trace"
    saved(folder, tiny_vit, NORMALIZED, num_labels=3)
    (folder / "model.safetensors").unlink()
    torch.save(Malicious(trace), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled cannot be loaded as an image classifier") as refusal:
        load(f"hf:{folder}")
    assert "\n" not in str(refusal.value)
    assert not trace.exists()


@pytest.mark.parametrize("model_type", ["vit", "planted"])
def test_code_in_the_directory_does_not_run(tmp_path: Path, model_type: str) -> None:
    folder, trace = tmp_path / "coded", tmp_path / "trace"
    saved(folder, tiny_vit, NORMALIZED, num_labels=3)
    (folder / "planted.py").write_text(f"open({str(trace)!r}, 'w')\nclass Network: ...\nclass Config: ...\n")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = model_type
    config["auto_map"] = {
        "AutoConfig": "planted.Config",
        "AutoModelForImageClassification": "planted.Network",
    }
    (folder / "config.json").write_text(json.dumps(config))
    try:
        load(f"hf:{folder}", device="cpu")
    except ValueError as error:
        assert "coded" in str(error)  # noqa: PT017 - to refuse it is as good as to load transformers' own class
    assert not trace.exists()


SPOILT: dict[str, Callable[[Path], object]] = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "damaged weights": lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 99),
    "damaged config": lambda folder: (folder / "config.json").write_text("{"),
    "no image classifier": lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_directory_that_holds_no_image_classifier_is_refused_in_one_sentence(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    folder = tmp_path / "spoilt"
    saved(folder, tiny_vit, NORMALIZED, num_labels=3)
    spoil(folder)
    with pytest.raises(ValueError, match="spoilt cannot be loaded as an image classifier") as refusal:
        load(f"hf:{folder}")
    assert "\n" not in str(refusal.value)


def test_weights_that_do_not_fill_the_network_are_refused(tmp_path: Path) -> None:
    """transformers would fill what is missing with random numbers and go on."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "headless"
    saved(folder, tiny_vit, NORMALIZED, num_labels=3)
    state = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("classifier")}
    assert len(kept) < len(state)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="headless"):
        load(f"hf:{folder}")


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "~/nowhere"])
def test_a_missing_directory_is_file_not_found(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"hf:{name} must name a directory or a model of the hub"):
        load(f"hf:{name}")


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_missing_package_is_reported_with_its_install_command(package: str) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(
        ValueError, match=rf"^model {package}:resnet18 needs {package}: pip install 'weakspot\[{package}\]'"
    ) as refusal:
        load(f"{package}:resnet18")
    assert "\n" not in str(refusal.value)
