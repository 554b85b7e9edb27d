"""Class activation against computations by hand, on networks of every form."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.networks import NETWORKS, FlatNetwork, Made, PoolingNetwork, TokenNetwork, untouched
from weakspot._checks import ModelWarning
from weakspot.attribution import class_activation
from weakspot.models import load

CLASSES = torch.tensor([0, 1, 1])


def spread(cells: Tensor, images: Tensor) -> Tensor:
    """Cells (N, h, w) as tiles of the image, (N, 1, H, W)."""
    return F.interpolate(cells[:, None], images.shape[2:], mode="bilinear", align_corners=False)


def grad_cam(tail: Callable[[Tensor], Tensor], activation: Tensor, classes: Tensor) -> Tensor:
    """Grad-CAM with summed gradients of maps (N, C, h, w), where `tail` makes logits of them: (N, h, w)."""
    activation = activation.detach().requires_grad_()
    picked = tail(activation).gather(1, classes[:, None]).sum()
    (gradient,) = torch.autograd.grad(picked, activation)
    return (gradient.sum((2, 3), keepdim=True) * activation.detach()).sum(1)


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """(N,) Pearson correlations of maps."""
    return torch.stack(
        [
            torch.corrcoef(torch.stack([a, b]))[0, 1]
            for a, b in zip(first.flatten(1), second.flatten(1), strict=True)
        ]
    )


def pooling_parts(model: nn.Module, images: Tensor) -> tuple[PoolingNetwork, Tensor]:
    """The pooling network and its last map, made from its modules one by one."""
    assert isinstance(model, PoolingNetwork)
    with torch.no_grad():
        stem = model.stem(images)
        return model, F.relu(stem + model.branch(stem))


def test_plain_cam_is_the_heads_weights_times_the_last_map(pooling: Made) -> None:
    model, images = pooling
    network, last = pooling_parts(model, images)
    expected = torch.einsum("nc,nchw->nhw", network.head.weight[CLASSES], last).detach()
    torch.testing.assert_close(class_activation(model, images, CLASSES), spread(expected, images))


def test_plain_cam_equals_grad_cam_where_both_exist(pooling: Made) -> None:
    model, images = pooling
    network, last = pooling_parts(model, images)
    expected = grad_cam(lambda maps: network.head(maps.mean((2, 3))), last, CLASSES)
    torch.testing.assert_close(class_activation(model, images, CLASSES), spread(expected, images))


@pytest.mark.parametrize("wanted", range(4))
def test_the_mean_of_a_plain_cam_is_the_logit_less_its_bias(pooling: Made, wanted: int) -> None:
    model, images = pooling
    network, _ = pooling_parts(model, images)
    classes = torch.full((3,), wanted)
    # Twofold bilinear enlargement keeps the mean of a map.
    found = class_activation(model, images, classes).mean((1, 2, 3)) + network.head.bias[wanted]
    torch.testing.assert_close(found, network(images)[:, wanted])


def test_a_flattened_map_gets_grad_cam() -> None:
    model, images = NETWORKS["flat, gray, two classes, not square"]()
    assert isinstance(model, FlatNetwork)
    last = F.relu(model.convolution(images))
    expected = grad_cam(lambda maps: model.head(maps.flatten(1)), last, CLASSES)
    torch.testing.assert_close(class_activation(model, images, CLASSES), spread(expected, images))


def test_tokens_get_grad_cam_of_the_last_normalized_tokens_that_reach_the_logit() -> None:
    model, images = NETWORKS["tokens, not square"]()
    assert isinstance(model, TokenNetwork)
    first, last = model.encoder.layers
    assert isinstance(last, nn.TransformerEncoderLayer)
    patches = model.embed(images).flatten(2).transpose(1, 2)
    tokens = first(torch.cat([model.token.expand(3, -1, -1), patches], 1) + model.places)
    normalized = last.norm1(tokens)
    assert normalized.shape == (3, 1 + 4 * 6, 16)

    def tail(maps: Tensor) -> Tensor:
        given = torch.cat([normalized[:, :1], maps.flatten(2).transpose(1, 2)], 1)
        mixed = tokens + last.self_attn(given, given, given, need_weights=False)[0]
        mixed = mixed + last.linear2(F.relu(last.linear1(last.norm2(mixed))))
        logits: Tensor = model.head(model.norm(mixed)[:, 0])
        return logits

    grid = normalized[:, 1:].transpose(1, 2).reshape(3, 16, 4, 6)
    torch.testing.assert_close(tail(grid), model(images))
    expected = grad_cam(tail, grid, CLASSES)
    torch.testing.assert_close(class_activation(model, images, CLASSES), spread(expected, images))


def test_a_network_without_a_map_gets_gradient_times_image() -> None:
    model, images = NETWORKS["linear"]()
    head = model.get_submodule("1")
    assert isinstance(head, nn.Linear)
    expected = (head.weight[CLASSES].view_as(images) * images).sum(1, keepdim=True)
    torch.testing.assert_close(class_activation(model, images, CLASSES), expected.detach())


def test_a_model_without_parameters_gets_gradient_times_image() -> None:
    class Halves(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            left, right = images[..., :4].mean((1, 2, 3)), images[..., 4:].mean((1, 2, 3))
            return torch.stack([left - right, right - left], 1)

    images = torch.rand(3, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    sign = torch.tensor([1.0, -1.0, -1.0])[:, None, None, None]
    sides = torch.tensor([1.0] * 4 + [-1.0] * 4)
    expected = (sign * sides * images / (3 * 6 * 4)).sum(1, keepdim=True)
    torch.testing.assert_close(class_activation(Halves().eval(), images, CLASSES), expected)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("layer", ["stem", "stem.0", "stem.1", "branch"])
def test_a_named_layer_is_read_as_it_came_out(pooling: Made, layer: str, wrapped: bool) -> None:
    """stem.1 is followed by an in-place ReLU, which must not change what is read of it."""
    model, images = pooling
    network, _ = pooling_parts(model, images)
    with torch.no_grad():
        before = {"stem": network.stem(images), "stem.0": network.stem[0](images)}
        before["stem.1"] = network.stem[1](before["stem.0"])
        before["branch"] = network.branch(before["stem"])

    def tail(maps: Tensor) -> Tensor:
        if layer == "stem.0":
            maps = network.stem[1](maps)
        stem = before["stem"] if layer == "branch" else maps if layer == "stem" else F.relu(maps)
        logits: Tensor = network.head(
            F.relu(stem + (maps if layer == "branch" else network.branch(stem))).mean((2, 3))
        )
        return logits

    torch.testing.assert_close(tail(before[layer]), network(images))
    expected = grad_cam(tail, before[layer], CLASSES)
    name = f"network.{layer}" if wrapped else layer
    torch.testing.assert_close(class_activation(model, images, CLASSES, layer=name), spread(expected, images))


def test_a_layer_may_be_named_by_its_number(pooling: Made) -> None:
    model, images = pooling
    numbered = nn.Sequential(*pooling_parts(model, images)[0].stem, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    maps = [class_activation(numbered.eval(), images, CLASSES, layer=layer) for layer in ("0", 0)]  # type: ignore[arg-type]
    assert torch.equal(*maps)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("brunch", r"layer must .*got 'brunch' \(did you mean 'branch'\?"),
        ("nothing like it", r"layer must be one of stem.*got 'nothing like it'"),
        ("head", r"layer must return a map of an image of 20 x 20, got 'head', which returns \(1, 4\)"),
        ("unused", r"layer must run and return a tensor, got 'unused'"),
    ],
)
def test_a_layer_that_cannot_be_used_is_refused_with_advice(pooling: Made, layer: str, message: str) -> None:
    model, images = pooling
    model.add_module("unused", nn.Conv2d(3, 3, 3))
    with untouched(model, images), pytest.raises(ValueError, match=message):
        class_activation(model, images, CLASSES, layer=layer)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("classes", torch.tensor([0, 1, 4])),
        ("classes", torch.tensor([0, -1, 2])),
        ("classes", torch.tensor([0, 1])),
        ("classes", torch.tensor([0.0, 1.0, 2.0])),
        ("images", torch.rand(3, 20, 20)),
        ("alignment", "resized"),
        ("model", None),
    ],
)
def test_a_wrong_argument_is_refused_by_name(pooling: Made, argument: str, value: Any) -> None:
    model, images = pooling
    arguments = {"model": model, "images": images, "classes": CLASSES, argument: value}
    with pytest.raises(ValueError, match=f"{argument}.*must"):
        class_activation(**arguments)


class Returning(nn.Module):
    """Hands its network's logits out inside something else."""

    def __init__(self, network: nn.Module, pack: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.network = network
        self.pack = pack

    def forward(self, images: Tensor) -> Any:
        return self.pack(self.network(images))


@pytest.mark.parametrize(
    "pack",
    [
        lambda logits: (logits, logits.sum()),
        lambda logits: {"loss": logits.sum(), "logits": logits},
        lambda logits: SimpleNamespace(logits=logits, hidden_states=None),
        lambda logits: logits[:, :, None, None],
    ],
    ids=["tuple", "mapping", "object", "singleton sites"],
)
@pytest.mark.parametrize("layer", [None, "stem"])
def test_how_logits_are_handed_out_changes_no_map(
    pooling: Made, pack: Callable[[Tensor], Any], layer: str | None
) -> None:
    model, images = pooling
    expected = class_activation(model, images, CLASSES, layer=layer)
    inner = None if layer is None else f"network.{layer}"
    found = class_activation(Returning(model, pack).eval(), images, CLASSES, layer=inner)
    torch.testing.assert_close(found, expected)


class Functional(nn.Module):
    """The pooling network as a plain function of parameters, without a single submodule."""

    def __init__(self, network: PoolingNetwork) -> None:
        super().__init__()
        state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        self.tensors = nn.ParameterDict(
            {
                name.replace(".", "_"): nn.Parameter(t.detach().clone(), t.is_floating_point())
                for name, t in state.items()
            }
        )

    def forward(self, images: Tensor) -> Tensor:
        of = self.tensors
        stem = F.conv2d(images, of["stem_0_weight"], of["stem_0_bias"], 2, 1)
        mean, variance = of["stem_1_running_mean"], of["stem_1_running_var"]
        stem = F.batch_norm(
            stem, mean.detach(), variance.detach(), of["stem_1_weight"], of["stem_1_bias"]
        ).relu_()
        last = torch.relu(stem + F.conv2d(stem, of["branch_weight"], of["branch_bias"], 1, 1))
        logits: Tensor = F.adaptive_avg_pool2d(last, 1).flatten(1) @ of["head_weight"].t() + of["head_bias"]
        return logits


def test_a_network_without_modules_gets_the_same_map(pooling: Made) -> None:
    model, images = pooling
    assert isinstance(model, PoolingNetwork)
    functional = Functional(model).eval()
    torch.testing.assert_close(functional(images), model(images))
    expected = class_activation(model, images, CLASSES)
    torch.testing.assert_close(class_activation(functional, images, CLASSES), expected)


@pytest.mark.parametrize("batch", [None, 1, 2, 3], ids="exported for a batch of {}".format)
@pytest.mark.parametrize("name", ["pooling", "flat, gray, two classes, not square"])
def test_an_exported_network_gets_the_same_map(name: str, batch: int | None, tmp_path: Path) -> None:
    model, images = NETWORKS[name]()
    sizes = None if batch else ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model, (images[:batch].clone(),), dynamic_shapes=sizes)
    torch.export.save(program, tmp_path / "network.pt2")
    exported = load(str(tmp_path / "network.pt2"))
    torch.testing.assert_close(exported(images), model(images))
    expected = class_activation(model, images, CLASSES)
    torch.testing.assert_close(class_activation(exported, images, CLASSES), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alignment", ["resize", "receptive_field", "effective"])
def test_an_images_map_depends_on_no_neighbor_and_leaves_the_model_alone(
    any_model: Made, alignment: str
) -> None:
    model, images = any_model
    with untouched(model, images, CLASSES):
        together = class_activation(model, images, CLASSES, alignment=alignment)
    assert together.shape == (3, 1, *images.shape[2:])
    assert not together.requires_grad
    for index in (2, 0, 1):
        one = slice(index, index + 1)
        alone = class_activation(model, images[one], CLASSES[one], alignment=alignment)
        torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)
        assert bool(alone.any())


class EnergyNetwork(nn.Module):
    """Mean squares instead of means before the linear layer: plain CAM does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.convolution(images)).square().mean((2, 3)).sqrt())
        return logits


def test_a_blank_neighbor_changes_no_map() -> None:
    """On a map of zeros every pooling gives the mean; the network is still none that ends in mean + linear."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, images = EnergyNetwork().eval(), torch.rand(2, 3, 12, 12)
    expected = class_activation(model, images, CLASSES[:2])
    beside_blank = torch.cat([torch.zeros_like(images[:1]), images])
    found = class_activation(model, beside_blank, torch.tensor([2, 0, 1]))[1:]
    torch.testing.assert_close(found, expected)


class TwoPaths(nn.Module):
    """Two classes, each with a convolution of its own: the last map of one is no map of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.red, self.green = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3)
        for convolution in (self.red, self.green):
            nn.init.constant_(convolution.weight, 0.2)
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        red = F.relu(self.red(images[:, :1])).mean((1, 2, 3))
        green = F.relu(self.green(images[:, 1:2])).mean((1, 2, 3))
        return torch.stack([red, green], 1)


@pytest.mark.parametrize("explained", [0, 1])
def test_a_class_is_explained_whatever_the_first_image_is_read_as(explained: int) -> None:
    model = TwoPaths().eval()
    images = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    images[0, 0] *= 0.1
    images[1, 1] *= 0.1
    assert model(images).argmax(1).tolist() == [1, 0]
    classes = torch.tensor([explained, explained])
    found = class_activation(model, images, classes)
    torch.testing.assert_close(class_activation(model, images.flip(0), classes).flip(0), found)
    # Evidence for a class stands where that class's own color is.
    assert float(correlation(found, images[:, explained : explained + 1]).min()) > 0.3


@pytest.mark.parametrize("name", ["pooling", "flat, gray, two classes, not square", "tokens, not square"])
def test_randomized_weights_give_another_map(name: str) -> None:
    model, _ = NETWORKS[name]()
    size = {"pooling": (3, 20, 20), "tokens, not square": (3, 16, 24)}.get(name, (1, 16, 12))
    images = torch.rand(16, *size, generator=torch.Generator().manual_seed(1))
    classes = torch.zeros(16, dtype=torch.long)
    trained = class_activation(model, images, classes)
    similarities = []
    with torch.random.fork_rng():
        for seed in range(8):
            torch.manual_seed(seed + 10)
            for module in model.modules():
                if isinstance(module, nn.Conv2d | nn.Linear | nn.MultiheadAttention):
                    for parameter in module.parameters():
                        nn.init.normal_(parameter, std=0.3)
            similarities.append(correlation(trained, class_activation(model, images, classes)))
    assert float(torch.stack(similarities).mean(0).abs().mean()) < 0.4


class FailingOnce(nn.Module):
    """Raises in the middle of the given forward pass, and only in that one."""

    def __init__(self, network: nn.Module, fail_at: int) -> None:
        super().__init__()
        self.network = network
        self.passes_left = fail_at

    def forward(self, images: Tensor) -> Tensor:
        self.passes_left -= 1
        logits: Tensor = self.network(images)
        if self.passes_left == 0:
            raise RuntimeError("out of memory, say")
        return logits


@pytest.mark.parametrize("fail_at", [1, 2, 3])
@pytest.mark.parametrize("alignment", ["receptive_field", "effective"])
@pytest.mark.parametrize("layer", [None, "network.stem"])
def test_after_a_failure_no_hook_and_no_mode_is_left(
    pooling: Made, layer: str | None, alignment: str, fail_at: int
) -> None:
    network, images = pooling
    expected = class_activation(FailingOnce(network, 0).eval(), images, CLASSES, layer=layer)
    model = FailingOnce(network, fail_at).eval()
    with untouched(model, images), pytest.raises(RuntimeError, match="out of memory, say"):
        class_activation(model, images, CLASSES, layer=layer, alignment=alignment)
    assert torch.overrides._get_current_function_mode_stack() == []
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    torch.testing.assert_close(
        class_activation(model, images, CLASSES, layer=layer), expected, rtol=0, atol=0
    )


@pytest.mark.parametrize("made_inside", [False, True], ids=["tensors from outside", "tensors made inside"])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("layer", [None, "stem"])
def test_grad_switches_outside_change_nothing(
    pooling: Made, without: Callable[[], Any], made_inside: bool, layer: str | None
) -> None:
    model, images = pooling
    classes = CLASSES
    expected = class_activation(model, images, classes, layer=layer)
    with without():
        if made_inside:  # as in a user's evaluation loop
            images, classes = images.clone(), classes.clone()
        found = class_activation(model, images, classes, layer=layer)
    assert torch.equal(found, expected)


def test_frozen_models_get_the_same_map_and_keep_their_gradients(any_model: Made) -> None:
    model, images = any_model
    expected = class_activation(model, images, CLASSES)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    model.requires_grad_(False)
    with untouched(model, images, CLASSES):
        found = class_activation(model, images, CLASSES)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_returns_probabilities_trips_a_warning(pooling: Made) -> None:
    model, images = pooling
    with pytest.warns(ModelWarning, match="as a softmax does"):
        class_activation(nn.Sequential(model, nn.Softmax(1)).eval(), images, CLASSES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_the_class_activation_of_float32(dtype: torch.dtype, pooling: Made) -> None:
    images, label = pooling[1][:2], torch.tensor([0, 1])
    whole = class_activation(pooling[0], images, label)
    half = class_activation(copy.deepcopy(pooling[0]).to(dtype), images, label)
    torch.testing.assert_close(half.float(), whole.float(), rtol=0.1, atol=0.1 * float(whole.abs().max()))


def test_no_warning_of_torch_leaks(pooling: Made) -> None:
    """The logits carry gradients while the layer is looked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        class_activation(pooling[0], pooling[1], torch.zeros(3, dtype=torch.long))


class SpreadPooling(nn.Module):
    """Logits of the standard deviations of maps, whose gradients sum to zero over each map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(F.gelu(self.conv(images)).std((2, 3)))
        return logits


@pytest.mark.parametrize("seed", range(3))
def test_rounding_errors_of_gradients_that_sum_to_zero_are_no_evidence(seed: int) -> None:
    torch.manual_seed(seed)
    images = torch.rand(3, 3, 24, 20)
    assert not class_activation(SpreadPooling().eval(), images, CLASSES).any()
    tail = [nn.InstanceNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]
    model = nn.Sequential(nn.Conv2d(3, 6, 3), *tail).eval()
    assert not class_activation(model, images, CLASSES, layer="0").any()
    assert class_activation(model, images, CLASSES).any()


@pytest.mark.slow
def test_a_compiled_model_has_the_class_activation_of_its_network() -> None:
    code = (
        "import torch\n"
        "from torch import nn\n"
        "from weakspot import class_activation\n"
        "tail = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]\n"
        "model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *tail).eval()\n"
        "images, classes = torch.rand(2, 3, 14, 18), torch.tensor([0, 3])\n"
        "expected = class_activation(model, images, classes)\n"
        "compiled = torch.compile(model, backend='eager')\n"
        "for _ in range(2):\n"
        "    assert torch.equal(class_activation(compiled, images, classes), expected)\n"
        "    compiled(images)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_default_type_of_new_tensors_changes_no_class_activation(any_model: Made) -> None:
    model, images = any_model
    for alignment in ("resize", "effective"):
        expected = class_activation(model, images, CLASSES, alignment=alignment)
        torch.set_default_dtype(torch.float64)
        try:
            found = class_activation(model, images, CLASSES, alignment=alignment)
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
