"""Model specs: one string, file or function becomes a classifier, and no file ever runs code."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.networks import Made, PoolingNetwork
from weakspot._errors import ModelError
from weakspot.classifier import Classifier
from weakspot.images import sample_images
from weakspot.models import available_models, load
from weakspot.models.identity import fingerprint
from weakspot.models.specs import plain_pixels_note

MODULE = """
from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4))

class Network(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(12, 3))

instance = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))

def build_nothing():
    return None

def build_a_class():
    return Network

number = 7
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory of somebody with modules of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    (tmp_path / "my_models.py").write_text(MODULE)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("")
    (tmp_path / "my_package" / "networks.py").write_text(MODULE)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def linear(classes: int = 4, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).eval()


# ---------------------------------------------------------------- the embedded network


def test_the_embedded_network_names_what_is_on_the_sample_photographs(
    capfd: pytest.CaptureFixture[str],
) -> None:
    classifier = load("efficientnet_lite0", device="cpu")
    images, names = sample_images(classifier.input_size)
    with torch.no_grad():
        predicted = classifier(images).argmax(1).tolist()
    assert dict(zip(names, map(classifier.class_name, predicted), strict=True)) == {
        "chelsea": "Egyptian cat",
        "coffee": "espresso",
        "rocket": "missile",
        "motorcycle": "moped",
    }
    assert not any(module.training for module in classifier.modules())
    assert capfd.readouterr() == ("", "")


def test_the_embedded_networks_classes_have_a_thousand_different_names() -> None:
    names = load("efficientnet_lite0", device="cpu").class_names
    assert len(set(names)) == len(names) == 1000
    assert all(names)


def test_the_embedded_network_is_listed() -> None:
    assert "efficientnet_lite0" in available_models()


# ---------------------------------------------------------------- package.module:factory


@pytest.mark.parametrize("module", ["my_models", "my_package.networks"])
@pytest.mark.parametrize(("name", "classes"), [("build", 4), ("Network", 3), ("instance", 2)])
def test_a_module_of_the_working_directory_gives_its_network(
    project: Path, images: Tensor, module: str, name: str, classes: int
) -> None:
    classifier = load(f"{module}:{name}", device="cpu")
    layer = classifier.network.get_submodule("1")
    assert isinstance(layer, nn.Linear)
    assert torch.equal(classifier(images), layer(images.flatten(1)))
    assert layer.out_features == classes
    assert not any(part.training for part in classifier.modules())


def test_a_classifier_a_factory_made_keeps_its_normalization(project: Path, images: Tensor) -> None:
    (project / "my_models.py").write_text(
        MODULE + "from weakspot.classifier import Classifier\n"
        "def normalized():\n    return Classifier.wrap(build(), mean=[0.5], std=[0.25], class_names=list('abcd'))\n"
    )
    classifier = load("my_models:normalized", device="cpu")
    torch.testing.assert_close(classifier(images), classifier.network((images - 0.5) / 0.25))
    assert classifier.class_names == ("a", "b", "c", "d")


SPECS: dict[str, tuple[Any, str]] = {
    "no such module": ("my_modles:build", "my_modles:build: there is no module 'my_modles'"),
    "no such submodule": ("my_package.nets:build", "there is no module 'my_package.nets'"),
    "a file and not a module": (
        "my_models.py:build",
        r"model must name a module, not a file, got my_models\.py:build \(write my_models:build\)",
    ),
    "a file in a folder": ("nets/b.py:build", r"\(write nets\.b:build\)"),
    "a file elsewhere": ("../my nets/b.py:build", r"\(write b:build in its folder\)"),
    "a path and not a module": ("./my_models.py:build", r"\(write my_models:build\)"),
    "no module": (":build", ":build"),
    "no such name": ("my_models:biuld", "got 'biuld' .did you mean 'build'"),
    "no name": ("my_models:", "got ''"),
    "returns nothing": (
        "my_models:build_nothing",
        "model my_models:build_nothing must be a torch.nn.Module .* got NoneType",
    ),
    "returns a class": ("my_models:build_a_class", "got type"),
    "a number": ("my_models:number", "got int"),
    "nearly an installed model": ("efficientnet_lite", "did you mean 'efficientnet_lite0'"),
    "no installed model": ("resnet50", "model must be one of .*efficientnet_lite0.* got 'resnet50'"),
    "nothing": ("", "''"),
    "weights, .pth": ("models/resnet.pth", r"got the weights models/resnet\.pth .*--weights"),
    "weights, .safetensors": ("resnet.safetensors", r"got the weights resnet\.safetensors .*--weights"),
    "no string and no module": (7, "model 7 must be .* got int"),
    "a function that makes none": (lambda: "network", "got str"),
}


@pytest.mark.parametrize(("spec", "message"), SPECS.values(), ids=SPECS)
def test_an_invalid_spec_is_refused_in_one_sentence(project: Path, spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        load(spec, device="cpu")
    assert "\n" not in str(refusal.value)


def test_a_module_that_lacks_a_package_is_refused_with_the_package(project: Path) -> None:
    (project / "my_models.py").write_text("import nonexistent_package_of_mine\n")
    with pytest.raises(ValueError, match="there is no module 'nonexistent_package_of_mine'"):
        load("my_models:build")


# ---------------------------------------------------------------- modules and functions


def test_a_module_itself_is_wrapped_and_evaluated(pooling: Made) -> None:
    model, images = pooling
    expected = model(images)
    classifier = load(model.train(), device="cpu")
    assert classifier.network is model
    torch.testing.assert_close(classifier(images), expected)


@pytest.mark.parametrize(
    "make", [PoolingNetwork, lambda: PoolingNetwork(classes=7), lambda: Classifier.wrap(PoolingNetwork())]
)
def test_a_function_that_makes_a_module_is_called(make: Callable[[], nn.Module]) -> None:
    assert isinstance(load(make, device="cpu").network, PoolingNetwork)


def test_a_classifier_itself_comes_back_as_it_is(any_model: Made) -> None:
    classifier = Classifier.wrap(any_model[0])
    assert load(classifier, device="cpu") is classifier


def test_mean_std_size_and_names_replace_what_the_model_brings(images: Tensor) -> None:
    network = linear()
    brought = Classifier.wrap(network, mean=[0.1], std=[0.2], input_size=(5, 6), class_names=list("abcd"))
    named = load(brought, device="cpu", class_names=["w", "x", "y", "z"])
    assert named.class_names == ("w", "x", "y", "z")
    assert named.input_size == (5, 6)
    assert torch.equal(named(images), brought(images))
    moved = load(brought, device="cpu", mean=[0.3, 0.4, 0.5], input_size=(7, 8))
    expected = network((images - torch.tensor([0.3, 0.4, 0.5]).view(3, 1, 1)) / 0.2)
    torch.testing.assert_close(moved(images), expected)
    assert (moved.class_names, moved.input_size) == (("a", "b", "c", "d"), (7, 8))
    assert torch.equal(
        load(brought, device="cpu", mean=[0.1], std=[0.4])(images), network((images - 0.1) / 0.4)
    )
    assert torch.equal(brought(images), network((images - 0.1) / 0.2))


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_a_classifier_lies_on_the_device_asked_for(images: Tensor, device: str) -> None:
    classifier = load(linear(), device=device)
    expected = torch.device("cpu")
    if device == "auto" and torch.cuda.is_available():
        expected = torch.device("cuda")
    elif device == "auto" and torch.backends.mps.is_available():
        expected = torch.device("mps")
    assert {tensor.device.type for tensor in [*classifier.parameters(), *classifier.buffers()]} == {
        expected.type
    }
    assert classifier(images.to(expected)).shape == (2, 4)


@pytest.mark.parametrize("device", ["nonsense", "", "cpu:x", "gpu"])
def test_text_that_is_no_device_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=rf"^device must be auto, cpu, cuda or mps, got '{device}'$"):
        load(linear(), device=device)


@pytest.mark.parametrize("device", ["cuda:99", "mps", "cuda"])
def test_a_device_that_this_machine_lacks_is_one_sentence(device: str) -> None:
    if device == (
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else ""
    ):
        pytest.skip("this machine has it")
    with pytest.raises(
        ValueError, match=rf"^device {device} is not available on this machine \(use auto or cpu;"
    ) as caught:
        load(linear(), device=device)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("os:system", "os:system must be in a module of yours, got os, which is part of Python"),
        ("sys:exit", "sys:exit must be in a module of yours"),
        ("os.path:join", "os.path:join must be in a module of yours"),
        (
            "my_models:needs",
            "a function without arguments that returns a torch.nn.Module, got one that needs size$",
        ),
        ("my_models:exits", "my_models:exits raised SystemExit: 0; a model must not end the process"),
    ],
)
def test_a_spec_that_is_no_factory_is_one_sentence(project: Path, spec: str, sentence: str) -> None:
    (project / "my_models.py").write_text(
        MODULE + "\n\ndef needs(size):\n    return Network()\n\n\ndef exits():\n    raise SystemExit(0)\n"
    )
    with pytest.raises((ValueError, ModelError), match=sentence) as caught:
        load(spec, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_file_of_this_folder_does_not_take_the_place_of_an_installed_module(project: Path) -> None:
    (project / "pytest.py").write_text("raise SystemExit(1)")
    (project / "my_models.py").write_text("import pytest\n" + MODULE)
    load("my_models:build", device="cpu")
    assert sys.path[-1] == str(project)


# ---------------------------------------------------------------- weights


def saved(folder: Path, state: Any, name: str = "weights.pt") -> Path:
    path = folder / name
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


WRAPPERS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "DataParallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "Lightning": lambda state: {
        "state_dict": {f"model.{key}": value for key, value in state.items()},
        "epoch": 3,
    },
    "torch.compile": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "a checkpoint": lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    "another checkpoint": lambda state: {"model_state_dict": state},
    "more than needed": lambda state: {**state, "head.weight": torch.zeros(3)},
    "doubles": lambda state: {key: value.double() for key, value in state.items()},
    "Classifier": lambda state: {f"network.{key}": value for key, value in state.items()},
}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_weights_fill_the_network_however_they_were_wrapped(
    tmp_path: Path, images: Tensor, wrap: Callable[[dict[str, Tensor]], Any], suffix: str
) -> None:
    trained, fresh = linear(seed=1), linear(seed=2)
    state = wrap(trained.state_dict())
    if suffix == ".safetensors" and not all(isinstance(value, Tensor) for value in state.values()):
        pytest.skip("safetensors hold tensors only")
    assert not torch.equal(fresh(images), trained(images))
    classifier = load(fresh, weights=saved(tmp_path, state, "weights" + suffix), device="cpu")
    assert torch.equal(classifier(images), trained(images))


def test_a_file_without_batch_counters_fits(tmp_path: Path, pooling: Made) -> None:
    trained, images = pooling
    state = {key: value for key, value in trained.state_dict().items() if "num_batches" not in key}
    path = saved(tmp_path, state, "old.safetensors")
    torch.testing.assert_close(load(PoolingNetwork, weights=path, device="cpu")(images), trained(images))


SPOILT: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "a tensor is missing": (
        lambda state: {"1.weight": state["1.weight"]},
        r"lacks 1 of the model's 2 tensors, for example 1\.bias",
    ),
    "another network's": (
        lambda state: {"conv.weight": torch.zeros(2)},
        r"lacks 2 of the model's 2 .*it has conv\.weight",
    ),
    "nothing": (lambda state: {}, "lacks 2 of the model's 2 .*it has nothing"),
    "wrong shape": (
        lambda state: {**state, "1.weight": torch.zeros(5, 12)},
        r"1\.weight must have shape \(4, 12\), got \(5, 12\)",
    ),
    "a tensor and no names": (
        lambda state: state["1.weight"],
        "must hold a state dict, names with tensors, got Tensor",
    ),
    "a list": (lambda state: list(state.values()), "must hold a state dict, names with tensors, got list"),
    "names without tensors": (lambda state: {"1.weight": 3, "1.bias": "x"}, "state dict"),
    "numbers for names": (lambda state: dict(enumerate(state.values())), r"weights\.pt"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILT.values(), ids=SPOILT)
def test_weights_that_do_not_fit_are_refused_and_the_network_stays_as_it_was(
    tmp_path: Path, images: Tensor, spoil: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    network = linear()
    expected = network(images)
    path = saved(tmp_path, spoil(linear(seed=1).state_dict()))
    with pytest.raises(ValueError, match=message) as refusal:
        load(network, weights=path, device="cpu")
    assert path.name in str(refusal.value)
    assert torch.equal(network(images), expected)


class Malicious:
    """A pickle that opens a file as soon as it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.trace), "w")


@pytest.mark.parametrize(
    "name", ["weights.pt", "weights.pth", "weights.bin", "weights.pkl", "weights.safetensors"]
)
@pytest.mark.parametrize("how", ["torch.save", "torch.save, legacy", "pickle", "hidden among tensors"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    tmp_path: Path, name: str, how: str
) -> None:
    trace, path = tmp_path / "trace", tmp_path / name
    network = linear()
    if how == "pickle":
        path.write_bytes(pickle.dumps(Malicious(trace)))
    else:
        state = {**network.state_dict(), "extra": Malicious(trace)} if "hidden" in how else Malicious(trace)
        torch.save(state, path, _use_new_zipfile_serialization="legacy" not in how)
    with pytest.raises(ValueError, match=name):
        load(network, weights=path, device="cpu")
    assert not trace.exists()
    if name != "weights.safetensors":
        torch.load(path, weights_only=False) if how != "pickle" else pickle.loads(path.read_bytes())  # noqa: S301
        assert trace.exists()  # the attack itself works


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04", b"\xff" * 64])
@pytest.mark.parametrize("name", ["damaged.pt", "damaged.safetensors"])
def test_a_damaged_file_of_weights_is_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        load(linear(), weights=tmp_path / name, device="cpu")


def test_missing_weights_are_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"weights must be a file, got .*none\.pt, which does not exist"
    ):
        load(linear(), weights=tmp_path / "none.pt", device="cpu")


def test_the_fingerprint_reads_values_whatever_their_strides() -> None:
    plain, strided = nn.Module(), nn.Module()
    plain.register_buffer("scale", torch.zeros(1))
    strided.register_buffer("scale", torch.arange(10.0).as_strided((1,), (5,)))
    assert fingerprint(plain) == fingerprint(strided)


@pytest.mark.parametrize("spec", ["my_models:build", "my_models:instance", "exported.pt2", "installed"])
def test_networks_of_the_user_may_need_normalized_images(
    project: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    entry = EntryPoint("installed", "my_models:build", "weakspot.models")
    monkeypatch.setattr("weakspot.models.specs.entry_points", lambda **_: [entry])
    assert project.is_dir()
    bare = Classifier.wrap(nn.Flatten())
    assert plain_pixels_note(spec, bare, "give mean and std") == (
        f"{spec} gets pixels in [0, 1] as they are (give mean and std unless it normalizes them itself or was trained "
        "on such pixels)"
    )
    # One that shifts or scales them gets other values.
    assert plain_pixels_note(spec, Classifier.wrap(nn.Flatten(), mean=[0.5]), "") is None
    assert plain_pixels_note(spec, Classifier.wrap(nn.Flatten(), std=[1.0, 1.0, 0.5]), "") is None


@pytest.mark.parametrize(
    "spec", ["mnist_standard", "hf:folder", "timm:resnet18", "torchvision:resnet18", "run"]
)
def test_networks_whose_preprocessing_is_known_get_what_they_were_trained_on(
    project: Path, spec: str
) -> None:
    (project / "run").mkdir()
    (project / "run/training.json").write_text("{}")
    assert plain_pixels_note(spec, Classifier.wrap(nn.Flatten()), "give mean and std") is None


def test_the_channels_of_a_classifier_survive_another_size() -> None:
    made = Classifier(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 2)).eval())
    made.channels = 1
    assert load(made, device="cpu", input_size=(28, 28)).channels == 1
    assert load(made, device="cpu", mean=(0.1, 0.2, 0.3), std=(1, 1, 1)).channels == 3


@pytest.mark.parametrize(("features", "channels"), [(784, 1), (3 * 784, 3), (64, 3), (2 * 784, 3)])
def test_a_network_of_flattened_images_says_how_many_channels_they_have(features: int, channels: int) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(features, 2)).eval()
    assert Classifier(network, input_size=(28, 28)).channels == channels


def test_a_convolution_decides_wherever_it_is_defined() -> None:
    network = nn.Module()
    network.head, network.stem = nn.Linear(784, 10), nn.Conv2d(3, 8, 3)
    assert Classifier(network.eval(), input_size=(28, 28)).channels == 3
