"""The reference networks are what their papers describe, and a seed gives one set of weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weakspot import LocalEdits, zoo
from weakspot.classifier import evaluating

# Weights by hand: He et al. 2016 say 0.27 million for ResNet-20; pre-activation ResNet-18 has 11.17 million.
WEIGHTS = {"two_conv": 166_406, "resnet20": 269_722, "preact_resnet18": 11_172_170}


@pytest.mark.parametrize("name", list(zoo.NETWORKS))
def test_a_network_has_its_weights_its_shape_and_its_seed(name: str) -> None:
    channels, size = (1, (28, 28)) if name == "two_conv" else (3, (32, 32))
    before = torch.random.get_rng_state()
    one, same, other = (
        zoo.build(name, classes=10, channels=channels, size=size, seed=seed) for seed in (3, 3, 4)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert sum(weight.numel() for weight in one.parameters()) == WEIGHTS[name]
    state, again, different = (model.state_dict() for model in (one, same, other))
    assert all(torch.equal(state[key], again[key]) for key in state)
    assert any(not torch.equal(state[key], different[key]) for key in state)
    assert one(torch.rand(2, channels, *size)).shape == (2, 10)
    odd = zoo.build(name, classes=3, channels=2, size=(20, 30))
    assert odd(torch.rand(2, 2, 20, 30)).shape == (2, 3)


def test_residual_stages_have_three_and_two_blocks_and_halve_the_maps() -> None:
    for name, blocks, sides in (("resnet20", 9, [32, 16, 8]), ("preact_resnet18", 8, [32, 16, 8, 4])):
        model = zoo.build(name, classes=10).eval()
        seen: list[int] = []
        found = [module for module in model.modules() if type(module).__name__ in {"_Block", "_PreactBlock"}]
        for module in found:
            module.register_forward_hook(lambda _, __, maps, seen=seen: seen.append(maps.shape[-1]))
        model(torch.rand(1, 3, 32, 32))
        assert len(found) == blocks
        assert sorted(set(seen), reverse=True) == sides
        convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
        assert convolutions == (19 if name == "resnet20" else 20)  # 18 + the linear layer, and 3 on shortcuts


@pytest.mark.parametrize("name", list(zoo.NETWORKS))
def test_small_edits_of_the_networks_are_exact(name: str) -> None:
    channels, size = (1, (28, 28)) if name == "two_conv" else (3, (32, 32))
    model = zoo.build(name, classes=10, channels=channels, size=size).eval()
    image = torch.rand(channels, *size)
    tops, lefts = torch.tensor([0, 5, size[0] - 2]), torch.tensor([0, 11, size[1] - 2])
    patches = torch.rand(3, channels, 2, 2)
    found = LocalEdits(model, image).logits(tops, lefts, patches)
    edited = image.repeat(3, 1, 1, 1)
    for number, (top, left) in enumerate(zip(tops.tolist(), lefts.tolist(), strict=True)):
        edited[number, :, top : top + 2, left : left + 2] = patches[number]
    with evaluating(model) as classifier, torch.no_grad():
        torch.testing.assert_close(found, classifier(edited), rtol=1e-4, atol=1e-4)


def test_invalid_arguments_are_refused() -> None:
    for arguments, message in (
        ({"name": "resnet19", "classes": 10}, "model must .* got 'resnet19' .did you mean"),
        ({"name": "resnet20", "classes": 1}, "classes must be an integer of at least 2, got 1"),
        ({"name": "resnet20", "classes": 2, "size": (4, 4)}, "size must"),
    ):
        with pytest.raises(ValueError, match=message):
            zoo.build(**arguments)  # type: ignore[arg-type]
