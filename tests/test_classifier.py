"""Classifiers: any network's logits, normalized as said, evaluated without leaving a trace."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.networks import Made, PoolingNetwork, untouched
from weakspot import Linf, attacks
from weakspot._checks import ImageWarning, ModelWarning, quiet
from weakspot.classifier import Classifier, as_classifier, check_images, evaluating, predict
from weakspot.explanations import explain
from weakspot.logits import OneLogit, logits_of, margin, runner_up


class Returning(nn.Module):
    """A linear network that returns its logits in a shape of its own."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.head = nn.Linear(12, 4)
        self.form = form

    def forward(self, images: Tensor) -> Any:
        return self.form(self.head(images.flatten(1)))


class MapView(nn.Module):
    """Draws random numbers whenever it is called, as stochastic depth or a randomized defense does."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.dropout(self.head(images.flatten(1)))
        return logits + 0.1 * torch.randn_like(logits)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- normalization


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ([0.5, 0.4, 0.3], [0.2, 0.3, 0.25]),
        ([0.5], [0.2, 0.3, 0.25]),
        ([0.5, 0.4, 0.3], [0.2]),
        ([0.5], [0.25]),
        ([0.0], [1.0]),
        ([0.0], [1 / 255]),
    ],
)
def test_the_network_gets_normalized_images(
    images: Tensor, mean: Sequence[float], std: Sequence[float]
) -> None:
    linear = nn.Linear(12, 4)
    logits = Classifier.wrap(nn.Sequential(nn.Flatten(), linear).eval(), mean=mean, std=std)(images)
    by_hand = images.double().clone()
    for channel in range(3):
        by_hand[:, channel] -= mean[channel % len(mean)]
        by_hand[:, channel] /= std[channel % len(std)]
    expected = by_hand.flatten(1) @ linear.weight.double().T + linear.bias.double()
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)


def test_without_mean_and_std_the_network_gets_the_images(any_model: Made) -> None:
    model, images = any_model
    assert torch.equal(Classifier.wrap(model)(images), model(images))


def test_the_network_is_not_copied(any_model: Made) -> None:
    model, images = any_model
    with untouched(model, images):
        classifier = Classifier.wrap(model, mean=[0.5], std=[0.5], class_names=["a", "b"])
        classifier(images)
    assert classifier.network is model
    assert as_classifier(classifier) is classifier


def test_a_double_precision_network_is_given_doubles(images: Tensor) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double().eval()
    logits = Classifier.wrap(network, mean=[0.1, 0.2, 0.3], std=[0.7])(images)
    mean = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64).view(3, 1, 1)
    torch.testing.assert_close(logits, network((images.double() - mean) / 0.7), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("mean", "std"), [([0.1, 0.2, 0.3], [1.0]), ([0.0], [0.2, 0.2, 0.2]), ([0.0], [1.0, 1.0, 1.0])]
)
def test_images_with_other_channels_than_the_normalization_are_refused(
    images: Tensor, mean: list[float], std: list[float]
) -> None:
    classifier = Classifier.wrap(Returning(lambda logits: logits).eval(), mean=mean, std=std)
    with pytest.raises(ValueError, match="images must have 3 channels, as mean and std, got 1"):
        classifier(images[:, :1])


def test_bytes_are_refused(images: Tensor) -> None:
    classifier = Classifier.wrap(Returning(lambda logits: logits).eval())
    with pytest.raises(
        ValueError, match=r"^images must be floats in \[0, 1\], got torch.uint8 \(divide bytes"
    ):
        classifier((images * 255).byte())


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.1, 0.2], [1.0, 1.0, 1.0], "one for each, got 2 and 3 values"),
        ([], [1.0], "got 0 and 1 values"),
        ([0.0], [], "got 1 and 0 values"),
        ([0.0], [0.0], "^std must be"),
        ([0.0], [0.5, -0.5, 0.5], "^std must be"),
        ([0.0], [float("nan")], "^std must be"),
        ([0.0], [float("inf")], "^std must be"),
        ([123.7, 116.3, 103.5], [1.0], "^mean must be .*divide means of bytes by 255"),
        ([float("nan")], [1.0], "^mean must be"),
        (0.5, [1.0], "^mean must be"),
        ([0.5], 0.25, "^std must be"),
        ([0.5], ["a"], r"^std must be .*got \['a'\]"),
        ([None] * 3, [1.0], "^mean must be .*got .None"),
    ],
)
def test_a_wrong_mean_or_std_is_refused_by_name(mean: Any, std: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classifier.wrap(nn.Linear(2, 2), mean=mean, std=std)


@pytest.mark.parametrize("module", [None, "model", lambda images: images, PoolingNetwork, {"a": 1}])
def test_an_object_that_is_not_a_module_is_refused(module: Any) -> None:
    with pytest.raises(ValueError, match=r"^model must be a torch\.nn\.Module that returns logits, got \w+"):
        Classifier.wrap(module)
    with pytest.raises(ValueError, match=r"^model must be a torch\.nn\.Module"), evaluating(module):
        pass


@pytest.mark.parametrize(
    ("network", "mean", "channels"),
    [
        (PoolingNetwork(1), [0.5], 1),
        (PoolingNetwork(3), [0.5], 3),
        (PoolingNetwork(3), [0.5, 0.5, 0.5], 3),
        (nn.Linear(3, 2), [0.5], 3),
    ],
)
def test_channels_are_those_of_the_normalization_or_the_first_convolution(
    network: nn.Module, mean: list[float], channels: int
) -> None:
    assert Classifier.wrap(network, mean=mean).channels == channels


@pytest.mark.parametrize(("index", "name"), [(0, "cat"), (1, "dog"), (2, "class 2"), (-1, "class -1")])
def test_a_class_without_a_name_is_called_by_its_number(index: int, name: str) -> None:
    assert Classifier.wrap(nn.Linear(2, 3), class_names=["cat", "dog"]).class_name(index) == name
    assert Classifier.wrap(nn.Linear(2, 3)).class_name(index) == f"class {index}"


def test_classes_that_share_a_name_are_told_apart_by_their_numbers() -> None:
    classifier = Classifier.wrap(nn.Linear(2, 3), class_names=["crane", "dog", "crane"])
    names = [classifier.class_name(index) for index in range(3)]
    assert names == ["crane (class 0)", "dog", "crane (class 2)"]


# ---------------------------------------------------------------- what networks return

FORMS: dict[str, Callable[[Tensor], Any]] = {
    "a tensor": lambda logits: logits,
    "a tuple": lambda logits: (logits, logits.mean()),
    "a tuple, features last": lambda logits: (logits, torch.zeros(len(logits), 64, 2, 2)),
    "a list": lambda logits: [logits],
    "a tuple in a list": lambda logits: [(logits,)],
    "a mapping with logits": lambda logits: {"features": torch.zeros(len(logits), 9), "logits": logits},
    "a mapping with out": lambda logits: {"aux": -logits, "out": logits},
    "a mapping with any name": lambda logits: {"loss": torch.zeros(()), "scores": logits},
    "an object": lambda logits: SimpleNamespace(hidden=torch.zeros(len(logits), 9), logits=logits),
    "one-pixel maps": lambda logits: logits[:, :, None, None],
    "an object with one-pixel maps": lambda logits: SimpleNamespace(logits=logits[:, :, None, None]),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_logits_are_found_in_whatever_a_network_returns(
    images: Tensor, form: Callable[[Tensor], Any]
) -> None:
    network = Returning(form).eval()
    assert torch.equal(Classifier.wrap(network)(images), network.head(images.flatten(1)))


NO_LOGITS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "one score": (lambda logits: logits[:, :1], r"tensor of shape \(5, 1\)"),
    "a vector": (lambda logits: logits[:, 0], r"tensor of shape \(5,\)"),
    "a number": (lambda logits: logits.sum(), r"tensor of shape \(\)"),
    "maps": (lambda logits: logits[:, :, None, None].expand(-1, -1, 7, 7), r"shape \(5, 4, 7, 7\)"),
    "a sequence": (lambda logits: logits[:, None].expand(-1, 3, -1), r"shape \(5, 3, 4\)"),
    "nothing": (lambda logits: None, "NoneType"),
    "an empty tuple": (lambda logits: (), "tuple"),
    "a tuple of scores": (lambda logits: (logits[:, 0], logits[:, :1]), "tuple"),
    "an empty mapping": (lambda logits: {}, "dict"),
    "a name": (lambda logits: "cat", "str"),
    "an object without": (lambda logits: SimpleNamespace(scores=logits), "SimpleNamespace"),
}


@pytest.mark.parametrize(("form", "what"), NO_LOGITS.values(), ids=NO_LOGITS)
def test_an_output_without_logits_is_refused_with_its_type(
    images: Tensor, form: Callable[[Tensor], Any], what: str
) -> None:
    with pytest.raises(
        ValueError,
        match=rf"the network must return logits .* got .*{what}( .one logit, z against 0: wrap .*)?$",
    ):
        Classifier.wrap(Returning(form).eval())(images)


def test_logits_keep_their_gradient(images: Tensor) -> None:
    asked = images.clone().requires_grad_()
    logits_of({"logits": (asked * 2,)[0].flatten(1)}).sum().backward()
    assert asked.grad is not None
    assert torch.equal(asked.grad, torch.full_like(images, 2))


# ---------------------------------------------------------------- evaluating


def evaluated(model: nn.Module, images: Tensor) -> Tensor:
    """What the model returns inside evaluating, where every part of it must be in eval mode."""
    with evaluating(model) as classifier:
        assert not any(module.training for module in classifier.modules())
        logits: Tensor = classifier(images)
        return logits


def test_a_module_in_train_mode_is_warned_of_and_its_mode_is_restored(pooling: Made) -> None:
    model, images = pooling
    assert isinstance(model, PoolingNetwork)
    expected = model(images)
    model.train()
    model.branch.eval()
    with untouched(model, images), pytest.warns(ModelWarning, match="PoolingNetwork was in train mode"):
        logits = evaluated(model, images)
    torch.testing.assert_close(logits, expected)
    assert model.training
    assert model.stem.training
    assert not model.branch.training


def test_a_model_with_a_submodule_in_train_mode_is_evaluated_in_eval_mode(pooling: Made) -> None:
    model, images = pooling
    assert isinstance(model, PoolingNetwork)
    expected = model(images)
    model.stem.train()
    with (
        untouched(model, images),
        pytest.warns(
            ModelWarning, match=r"^parts of PoolingNetwork were in train mode \(stem\.1\); weakspot evaluates"
        ),
    ):
        torch.testing.assert_close(evaluated(model, images), expected)
    assert model.stem[1].training


def test_a_model_in_eval_mode_causes_no_warning(any_model: Made) -> None:
    model, images = any_model
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with untouched(model, images), evaluating(model) as classifier:
            classifier(images)
    assert [str(warning.message) for warning in caught if issubclass(warning.category, ModelWarning)] == []


@pytest.mark.filterwarnings("ignore::weakspot._checks.ModelWarning")
@pytest.mark.parametrize("training", [True, False])
def test_state_is_restored_if_the_body_raises(pooling: Made, training: bool) -> None:
    model, images = pooling
    model.train(training)
    next(model.children()).train(not training)

    def body() -> None:
        with evaluating(model) as classifier:
            torch.rand(3)
            classifier(images)
            raise KeyError("the body")

    with untouched(model, images), pytest.raises(KeyError, match="the body"):
        body()


class KeepsItsMode(nn.Sequential):
    """Refuses .train() and .eval(), as exported modules do."""

    def train(self, mode: bool = True) -> KeepsItsMode:
        raise NotImplementedError


def test_a_module_that_refuses_eval_is_evaluated(images: Tensor) -> None:
    model = KeepsItsMode(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 4))
    with pytest.warns(ModelWarning):
        assert torch.equal(evaluated(model, images), model[2](images.flatten(1)))
    assert all(module.training for module in model.modules())


class Modal(nn.Module):
    """Batch-norm, dropout, and frozen batch-norm: all that train mode changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.frozen = nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval()
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(12, 4)
        for norm in (self.norm, self.frozen):
            nn.init.uniform_(norm.running_mean, -1, 1)  # type: ignore[arg-type]
            nn.init.uniform_(norm.running_var, 0.5, 2)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1] != 3:
            raise KeyError("channels")
        logits: Tensor = self.head(self.dropout(self.frozen(self.norm(images)).flatten(1)))
        return logits


@pytest.mark.parametrize("switch", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_call_evaluates_in_eval_mode_and_changes_no_mode_or_statistic(
    images: Tensor, switch: Callable[[], Any]
) -> None:
    model = Modal()
    expected = copy.deepcopy(model).eval()(images)
    classifier = Classifier.wrap(model)
    with untouched(model, images), switch():
        with pytest.warns(
            ModelWarning, match="^Modal was in train mode; weakspot evaluates it in eval mode and"
        ):
            first = classifier(images)
        for found in (
            first,
            classifier(images),
            Classifier.wrap(model)(images),
        ):  # a second warning is an error
            torch.testing.assert_close(found, expected)
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)


@pytest.mark.filterwarnings("ignore:.*train mode")
def test_a_call_that_fails_leaves_every_mode(images: Tensor) -> None:
    model = Modal()
    with untouched(model), pytest.raises(KeyError, match="channels"):
        Classifier.wrap(model)(images[:, :1])
    assert [module.training for module in model.modules()] == [True, True, False, True, True]


def test_modes_that_a_network_switches_itself_are_restored(images: Tensor) -> None:
    class Switching(Modal):
        def forward(self, images: Tensor) -> Tensor:
            self.frozen.train()
            self.dropout.eval()
            return super().forward(images)

    model = Switching().eval()
    Classifier.wrap(model)(images)
    assert not any(module.training for module in model.modules())


def test_train_mode_of_weakspots_wrappers_causes_no_warning(images: Tensor) -> None:
    model = Modal()
    classifier = Classifier.wrap(model)
    model.eval()
    assert classifier.training
    with untouched(classifier):
        torch.testing.assert_close(classifier(images), model(images))  # a warning would be an error here


def test_submodules_whose_mode_does_not_matter_cause_no_warning(images: Tensor) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    model[1] = nn.Sequential(nn.Linear(12, 4), nn.ReLU())
    Classifier.wrap(model)(images)
    assert model[1].training


def test_an_exported_network_with_a_fixed_mode_causes_no_warning(images: Tensor) -> None:
    exported = torch.export.export(Modal().eval(), (images,)).module()
    assert exported.training
    with evaluating(exported) as classifier:
        classifier(images)
    assert exported.training


def test_in_its_own_mode_a_classifier_can_be_trained(images: Tensor) -> None:
    model = Modal()
    before = model.norm.running_mean.clone()  # type: ignore[union-attr]
    Classifier.wrap(model).in_own_mode(images).sum().backward()
    assert model.norm.running_mean is not None
    assert not torch.equal(model.norm.running_mean, before)
    assert model.head.weight.grad is not None


SWITCHES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "neither": torch.enable_grad,
}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_gradients_are_on_inside_and_the_switches_come_back(
    any_model: Made, switch: Callable[[], Any]
) -> None:
    model, images = any_model
    leaf = images.clone().requires_grad_()
    expected = torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)[0]
    with switch():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with evaluating(model) as classifier:
            inside = images.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(classifier(inside)[:, 0].sum(), inside)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    torch.testing.assert_close(gradient, expected)


def test_random_numbers_drawn_inside_do_not_change_those_drawn_after(images: Tensor) -> None:
    model = MapView()
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    with pytest.warns(ModelWarning):
        drawn = evaluated(model, images)
    assert not torch.equal(drawn, model.head(images.flatten(1)))
    assert torch.equal(torch.rand(4), expected)


# ---------------------------------------------------------------- images at the door


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.5), (0.0, 1.1), (-2.1, 2.6), (0.0, 255.0)])
def test_images_outside_the_unit_range_are_clipped_with_a_warning(
    images: Tensor, low: float, high: float
) -> None:
    stretched = low + images * (high - low) / images.max()
    stretched[0, 0, 0, 0] = low
    with pytest.warns(ImageWarning, match=r"^images span .* mean=\.\.\., std=\.\.\."):
        checked = check_images(stretched, Classifier.wrap(nn.Linear(2, 2)))
    assert torch.equal(checked, stretched.clamp(0, 1))


@pytest.mark.parametrize(("low", "high"), [(-3e-8, 1.0), (0.0, 1 + 1.2e-7), (0.0, 1.0)])
def test_rounding_errors_are_clipped_without_a_warning(images: Tensor, low: float, high: float) -> None:
    images[0, 0, 0, 0], images[0, 0, 0, 1] = low, high
    checked = check_images(images, Classifier.wrap(nn.Linear(2, 2)))  # an ImageWarning would be an error
    assert torch.equal(checked, images.clamp(0, 1))


def test_checked_images_are_never_the_callers_own(images: Tensor) -> None:
    before = images.clone()
    check_images(images, Classifier.wrap(nn.Linear(2, 2))).zero_()
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda images: images.index_fill(0, torch.tensor([3]), torch.nan),
            r"^images must .* in images\[3\]",
        ),
        (
            lambda images: images.index_fill(0, torch.tensor([4]), -torch.inf),
            r"^images must .* NaN or infinity in images\[4\]",
        ),
        (lambda images: (images * 255).byte(), r"^images must .* got torch\.uint8 .*divide bytes by 255"),
        (lambda images: images > 0.5, r"^images must .* got torch\.bool"),
        (lambda images: images[0], r"^images must .* got \(3, 2, 2\).*images\[None\]"),
        (lambda images: images[None], r"^images must .* got \(1, 5, 3, 2, 2\)"),
        (lambda images: images[:0], r"^images must hold at least one pixel, got shape \(0, 3, 2, 2\)"),
        (lambda images: images[..., :0], "must hold at least one pixel"),
        (lambda images: images.numpy(), "^images must be a float tensor .* got ndarray"),
        (list, "^images must .* got list"),
        (Tensor.to_sparse, "^images must be a dense tensor that has values, got a torch.sparse_coo tensor"),
        (lambda images: images.to("meta"), "^images must be .* has values, got a meta tensor"),
        (lambda images: None, "^images must .* got NoneType"),
    ],
)
def test_invalid_images_are_refused(images: Tensor, spoil: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_images(spoil(images), Classifier.wrap(nn.Linear(2, 2)))


def test_a_network_without_values_is_refused_in_one_sentence(images: Tensor) -> None:
    model = Classifier.wrap(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).to("meta").eval())
    with (
        pytest.raises(ValueError, match=r"^Sequential must have weights, got meta tensors"),
        evaluating(model),
    ):
        pass


def test_a_size_that_the_network_does_not_take_is_one_sentence() -> None:
    fixed = Classifier.wrap(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 6, 2)).eval(), input_size=(8, 6))
    wrong = torch.rand(2, 3, 6, 6)
    sentence = "^images must have a size that Sequential takes, such as its input_size 8 x 6, got 6 x 6 .mat1"
    with pytest.raises(ValueError, match=sentence):
        fixed(wrong)
    with pytest.raises(ValueError, match=sentence):
        attacks.pgd(fixed, wrong, torch.tensor([0, 1]), steps=1)


def test_other_errors_of_a_network_stay_as_they_are(images: Tensor) -> None:
    class Full(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB (size 3)")

    # Adaptive batches look for this error; the images' size is not the reason.
    with pytest.raises(torch.OutOfMemoryError):
        Classifier.wrap(Full().eval(), input_size=(9, 9))(images)


# ---------------------------------------------------------------- one logit, and names from a config


@pytest.mark.parametrize("shape", ["(N,)", "(N, 1)", "(N, 1, 1, 1)", ".logits"])
def test_one_logit_is_two_classes_with_logits_zero_and_z(images: Tensor, shape: str) -> None:
    head = nn.Linear(12, 1)

    class One(nn.Module):
        def forward(self, images: Tensor) -> Any:
            z = head(images.flatten(1))
            forms = {
                "(N,)": z[:, 0],
                "(N, 1)": z,
                "(N, 1, 1, 1)": z[..., None, None],
                ".logits": SimpleNamespace(logits=z),
            }
            return forms[shape]

    if shape != ".logits":
        with pytest.raises(
            ValueError, match=r"one logit, z against 0: wrap the network in weakspot\.OneLogit"
        ):
            Classifier.wrap(One().eval())(images)
    logits = Classifier.wrap(OneLogit(One()).eval())(images)
    z = head(images.flatten(1))
    assert torch.equal(logits, torch.cat([torch.zeros_like(z), z], 1))
    assert torch.equal(margin(logits, torch.ones(5, dtype=torch.long)), z[:, 0])


def test_one_label_of_a_multi_label_network_is_a_question_of_its_own(images: Tensor) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    for label in range(4):
        logits = OneLogit(network, label=label)(images)
        assert torch.equal(logits[:, 1], network(images)[:, label])
        assert not logits[:, 0].any()
    with pytest.raises(ValueError, match="label must be between 0 and 3, got 4"):
        OneLogit(network, label=4)(images)
    with pytest.raises(ValueError, match=r"one logit for each image, got 4 \(give label=\)"):
        OneLogit(network)(images)


def test_an_attack_on_one_logit_reaches_the_closed_form() -> None:
    weights = torch.randn(1, 48, generator=torch.Generator().manual_seed(0))
    linear = nn.Linear(48, 1)
    linear.weight.data, linear.bias.data = weights, torch.tensor([1.0])
    model = Classifier.wrap(OneLogit(nn.Sequential(nn.Flatten(), linear)).eval(), input_size=(4, 4))
    images = torch.full((1, 3, 4, 4), 0.5)
    label = model(images).argmax(1)
    pairs = attacks.pgd(model, images, label, budget=Linf(0.1), steps=10)
    # z moves by eps times the L1 norm of the weights, toward zero.
    before, after = (model(batch)[0, 1] for batch in (images, pairs.adversarial))
    torch.testing.assert_close((before - after).abs(), 0.1 * weights.abs().sum())
    assert before.sign() == (before - after).sign()


def test_every_analysis_explains_one_logit(pooling: Made) -> None:
    model, images = pooling
    binary = Classifier.wrap(OneLogit(model, label=0).eval())
    labels = binary(images).argmax(1)
    explanation = explain(binary, attacks.pgd(binary, images, labels, steps=2))
    assert len(explanation) == len(images)
    assert set(explanation.scores["label"]) <= {"class 0", "class 1"}


@pytest.mark.parametrize(
    ("table", "names"),
    [
        ({0: "cat", 1: "dog"}, ("cat", "dog")),
        ({1: "dog", 0: "cat"}, ("cat", "dog")),
        ({0: "LABEL_0", 1: "LABEL_1"}, ()),
        ({}, ()),
        (None, ()),
        ({"a": "cat"}, ()),
    ],
)
def test_class_names_come_from_the_config_of_a_network(table: Any, names: tuple[str, ...]) -> None:
    network = nn.Linear(2, 2)
    network.config = SimpleNamespace(id2label=table)  # type: ignore[assignment]
    assert Classifier.wrap(network).class_names == names
    assert Classifier.wrap(network).input_size == (224, 224)
    assert Classifier.wrap(network, class_names=["own", "names"]).class_names == ("own", "names")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (32, (32, 32)),
        ([32, 48], (32, 48)),
        (None, (224, 224)),
        ("large", (224, 224)),
        ([1, 2, 3], (224, 224)),
    ],
)
def test_the_image_size_comes_from_the_config_of_a_network(size: Any, expected: tuple[int, int]) -> None:
    network = nn.Linear(2, 2)
    network.config = SimpleNamespace(image_size=size)  # type: ignore[assignment]
    assert Classifier.wrap(network).input_size == expected
    assert Classifier.wrap(network, input_size=(8, 9)).input_size == (8, 9)


# ---------------------------------------------------------------- predicting


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100, None])
def test_logits_do_not_depend_on_the_batch_size(any_model: Made, batch_size: int | None) -> None:
    model, images = any_model
    with untouched(model, images), evaluating(model) as classifier:
        logits = predict(classifier, images, batch_size)
    assert not logits.requires_grad
    torch.testing.assert_close(logits, model(images).detach())


@pytest.mark.parametrize(
    "broken",
    [
        lambda logits: logits.softmax(1),
        lambda logits: F.one_hot(logits.argmax(1), 4).float(),
        lambda logits: (logits.softmax(1), logits),
    ],
)
def test_a_model_that_returns_probabilities_is_warned_of(
    images: Tensor, broken: Callable[[Tensor], Any]
) -> None:
    classifier = Classifier(Returning(broken).eval(), name="softened")
    with pytest.warns(
        ModelWarning, match=r"^softened returns values between 0 and 1 that sum to one.*before the softmax"
    ):
        predict(classifier, images)


MULTI_LABEL: dict[str, Callable[[Tensor], Any]] = {
    "sigmoid": torch.sigmoid,
    "sigmoid, in a tuple": lambda logits: (logits.sigmoid(), logits.sum()),
    "sigmoid, one-pixel maps": lambda logits: logits[:, :, None, None].sigmoid(),
    "by hand": lambda logits: 1 / (1 + (-5 * logits).exp()),
    "cut": lambda logits: (10 * logits).clamp(0, 1),
}


@pytest.mark.parametrize("form", MULTI_LABEL)
def test_a_model_that_ends_in_sigmoids_is_named_multi_label_once(images: Tensor, form: str) -> None:
    network = Returning(MULTI_LABEL[form]).eval()
    nn.init.normal_(network.head.weight, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(network.head.bias)
    classifier, seen = Classifier.wrap(network), []
    network.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(
        ModelWarning, match=r"between 0 and 1 that do not sum to one.*\(multi-label\).*before the sigmoid"
    ):
        predict(classifier, images)
    predict(classifier, images)  # a second warning would be an error here
    assert len(seen) == 2  # the user's hooks see no probes


def test_probabilities_are_warned_of_once_per_network(images: Tensor) -> None:
    network = Returning(lambda logits: logits.softmax(1)).eval()
    with quiet(ModelWarning):
        predict(Classifier.wrap(network), images)  # not heard, so not said
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            predict(Classifier.wrap(network), images)
            attacks.pgd(network, images, torch.zeros(5, dtype=torch.long), steps=3)
    assert len([one for one in caught if "sum to one" in str(one.message)]) == 1


def test_logits_that_resemble_probabilities_by_chance_cause_no_warning(images: Tensor) -> None:
    linear = nn.Linear(12, 2)
    nn.init.zeros_(linear.weight)
    with torch.no_grad():
        linear.weight[0, 0], linear.weight[1, 0] = 0.01, -0.01  # rows sum to one and lie in [0, 1] for images
        linear.bias[:] = 0.5
    network = nn.Sequential(nn.Flatten(), linear).eval()
    logits = predict(Classifier.wrap(network), images)  # a ModelWarning would be an error here
    assert torch.equal(logits, network(images))
    assert logits.min() >= 0
    torch.testing.assert_close(logits.sum(1), torch.ones(len(images)))  # they do resemble probabilities


@pytest.mark.parametrize(
    "sound",
    [
        lambda logits: logits,
        lambda logits: logits.log_softmax(1),
        lambda logits: logits.abs(),
        lambda logits: 0.1 + 0.01 * logits.sigmoid(),  # between 0 and 1 for every image
        lambda logits: logits.relu() / 50,
        lambda logits: logits - logits.mean(1, keepdim=True) + 0.25,  # sums to one, but with negative values
    ],
)
def test_logits_cause_no_warning(images: Tensor, sound: Callable[[Tensor], Tensor]) -> None:
    network = Returning(sound).eval()
    logits = predict(Classifier.wrap(network), images)  # a ModelWarning would be an error here
    assert torch.equal(logits, sound(network.head(images.flatten(1))))


class NegativeRoots(nn.Module):
    """NaN wherever a pixel is black."""

    def forward(self, images: Tensor) -> Tensor:
        return (images.flatten(1) - 0.05).sqrt()


@pytest.mark.parametrize("bad", [0, 3, 4])
def test_logits_that_are_nan_are_refused_with_the_image(images: Tensor, bad: int) -> None:
    classifier = Classifier.wrap(NegativeRoots().eval())
    images = images.clamp_min(0.1)
    assert bool(predict(classifier, images, batch_size=2).isfinite().all())
    images[bad, 0, 0, 0] = 0
    with pytest.raises(
        ValueError,
        match=f"NegativeRoots returned NaN or infinity for image {bad} of 5, which may be changed images",
    ):
        predict(classifier, images, batch_size=2)


# ---------------------------------------------------------------- margins


@st.composite
def scored(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Logits (N, K), ties among them, and a label for each row."""
    count, classes = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    rows = st.lists(st.integers(-3, 3), min_size=classes, max_size=classes)
    logits = torch.tensor(draw(st.lists(rows, min_size=count, max_size=count)), dtype=torch.float32)
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count))
    return logits, torch.tensor(labels)


@given(scored())
def test_the_margin_is_the_labels_lead_over_the_best_other_class(case: tuple[Tensor, Tensor]) -> None:
    logits, labels = case
    best, classes = runner_up(logits, labels)
    for row, label, value, rival, lead in zip(
        logits.tolist(),
        labels.tolist(),
        best.tolist(),
        classes.tolist(),
        margin(logits, labels).tolist(),
        strict=True,
    ):
        others = [score for index, score in enumerate(row) if index != label]
        assert value == max(others)
        assert rival != label
        assert row[rival] == value
        assert lead == row[label] - max(others)


@given(scored(), st.integers(0, 5))
def test_the_margin_to_a_given_class_is_the_difference_of_two_logits(
    case: tuple[Tensor, Tensor], shift: int
) -> None:
    logits, labels = case
    competing = (labels + shift) % logits.shape[1]
    expected = [row[label] - row[other] for row, label, other in zip(logits, labels, competing, strict=True)]
    assert torch.equal(margin(logits, labels, competing), torch.stack(expected))


@given(scored())
def test_a_negative_margin_is_another_class_predicted(case: tuple[Tensor, Tensor]) -> None:
    logits, labels = case
    lead = margin(logits, labels)
    predicted = logits.argmax(1)
    assert bool((predicted[lead < 0] != labels[lead < 0]).all())
    assert bool((predicted[lead > 0] == labels[lead > 0]).all())


def test_weights_of_inference_mode_are_named() -> None:
    with torch.inference_mode():
        network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
    # Without gradients there is nothing to refuse.
    assert attacks.pixel_sweep(network, torch.rand(1, 3, 2, 2), torch.tensor([0])).margin.shape == (1, 2, 2)
    with pytest.raises(ValueError, match=r"must be made outside of torch\.inference_mode\(\)"):
        attacks.pgd(network, torch.rand(2, 3, 2, 2), torch.tensor([0, 1]), steps=1)
    attacks.pgd(copy.deepcopy(network), torch.rand(2, 3, 2, 2), torch.tensor([0, 1]), steps=1)


def test_a_network_that_returns_another_number_of_rows_is_told_so() -> None:
    class Pooled(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((0, 2, 3))[None]

    images = torch.rand(3, 3, 6, 6)
    with pytest.raises(ValueError, match="Pooled must return one row per image, got 1 for 3"):
        attacks.pgd(Pooled().eval(), images, torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_size": 16}, "input_size must be (height, width) in pixels, both at least 1, got 16"),
        ({"input_size": (16,)}, "input_size must be (height, width) in pixels, both at least 1, got (16,)"),
        (
            {"input_size": (0, 16)},
            "input_size must be (height, width) in pixels, both at least 1, got (0, 16)",
        ),
        ({"class_names": "cat"}, "class_names must be a list of texts, one per class, got 'cat'"),
        (
            {"class_names": np.array(["a", "b"])},
            "class_names must be a list of texts, one per class, got array(",
        ),
        ({"class_names": [1, 2]}, "class_names must be a list of texts, one per class, got [1, 2]"),
    ],
)
def test_a_size_and_names_of_other_forms_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Classifier.wrap(nn.Flatten(), **options)
    numbers: Any = (np.int64(8), 8)
    assert Classifier.wrap(nn.Flatten(), input_size=numbers).input_size == (8, 8)
