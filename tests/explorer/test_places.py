"""Probes, proposed masks, erased places, weak spots, layers and units: each against the model itself."""

from __future__ import annotations

import base64
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.explorer.benches import SIZE, Events, png, square
from tests.networks import NETWORKS
from weakspot import regions
from weakspot._checks import collected_warnings
from weakspot.classifier import Classifier
from weakspot.defenses import mask_units
from weakspot.explorer.bench import Bench
from weakspot.explorer.desk import Desk
from weakspot.explorer.messages import Message, read_mask
from weakspot.explorer.pair_explanations import read_concepts
from weakspot.explorer.place_masks import MASKS
from weakspot.logits import margin
from weakspot.regions import read_region


def ask(desk: Desk, name: str, **body: object) -> Message:
    return desk.ask(name, {"image": 0, **body}).result(60)


def logits_of(desk: Desk, image: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = desk.bench.classifier(image)[0]
    return logits


def array(value: object) -> Tensor:
    assert isinstance(value, dict)
    content = bytearray(base64.b64decode(value["base64"]))
    return torch.frombuffer(content, dtype=torch.float32).view(value["shape"])


def mask_in(message: Message) -> Tensor:
    return read_mask(base64.b64decode(str(message["mask"])), SIZE)


def assert_told(desk: Desk, told: Message, image: Tensor) -> None:
    """The logits that were told are those of the whole network, to 1e-4 of their range."""
    logits = logits_of(desk, image)
    top = told["top"]
    assert isinstance(top, list)
    near = 1e-4 * float(logits.max() - logits.min())
    for guess in top:
        assert guess["logit"] == pytest.approx(float(logits[guess["index"]]), abs=near)
        assert guess["probability"] == pytest.approx(float(logits.softmax(0)[guess["index"]]), abs=1e-4)
    label = desk.bench.exhibit(0).label_tensor
    assert told["margin"] == pytest.approx(float(margin(logits[None], label)), abs=2 * near)


@pytest.mark.parametrize("size", [1, 2, 5, 64])
@pytest.mark.parametrize(("y", "x"), [(0, 0), (23, 19), (10, 7)])
def test_a_probe_is_the_decision_of_the_edited_image(desk: Desk, y: int, x: int, size: int) -> None:
    told = ask(desk, "probe", y=y, x=x, size=size, color=[255, 0, 51], n=17)
    box = told["box"]
    assert isinstance(box, list)
    top, left, tall, wide = box
    assert (tall, wide) == (min(size, 24), min(size, 20))
    assert top <= y < top + tall
    assert left <= x < left + wide
    edited = desk.bench.exhibit(0).pixels.clone()
    edited[:, :, top : top + tall, left : left + wide] = torch.tensor([1, 0, 0.2]).view(1, 3, 1, 1)
    assert told["n"] == 17
    assert_told(desk, told, edited)
    clean = logits_of(desk, desk.bench.exhibit(0).pixels)
    assert told["changed"] == (int(logits_of(desk, edited).argmax()) != int(clean.argmax()))


def test_a_probe_of_a_brushed_place_paints_that_place_alone(desk: Desk) -> None:
    mask = square(3, 4, 5) & (torch.rand(1, 1, *SIZE, generator=torch.Generator().manual_seed(0)) < 0.6)
    told = ask(desk, "probe", mask=png(mask), color=[0, 255, 0])
    color = torch.tensor([0, 1, 0]).view(1, 3, 1, 1).float()
    assert_told(desk, told, torch.where(mask, color, desk.bench.exhibit(0).pixels))


def test_the_heat_map_is_the_probe_at_each_of_its_places(desk: Desk) -> None:
    events = Events(desk, "heat", {"image": 0, "size": 3, "grid": 5, "color": [255, 255, 255]})
    assert events.last()["event"] == "done"
    rows = events.named("rows")
    assert [event["row"] for event in rows] == list(range(5))
    for number, event in enumerate(rows):
        centers = event["centers"]
        assert isinstance(centers, dict)
        for column, x in enumerate(centers["x"]):
            told = ask(desk, "probe", y=centers["y"][number], x=x, size=3, color=[255, 255, 255])
            assert float(array(event["margins"])[0, column]) == pytest.approx(told["margin"], abs=1e-4)
            assert int(array(event["classes"])[0, column]) == told["predicted"]["index"]  # type: ignore[index]
    corners = rows[0]["centers"]
    assert isinstance(corners, dict)
    assert (corners["y"][0], corners["y"][-1], corners["x"][-1]) == (1, 22, 18)  # patches touch the borders


@pytest.mark.parametrize("kind", [kind for kind in MASKS if kind not in {"superpixel", "weakest"}])
def test_a_proposed_mask_is_the_region_of_the_command_line(desk: Desk, kind: str) -> None:
    told = ask(desk, "mask", kind=kind, fraction=0.2, count=3 if kind == "border" else 20)
    exhibit = desk.bench.exhibit(0)
    text, classifier = str(told["region"]), desk.bench.classifier
    with collected_warnings() as warned:
        expected = read_region(text, classifier, exhibit.pixels, exhibit.label_tensor, fraction=0.2)
    assert told["remark"] == (" ".join(warned) or None)
    assert torch.equal(mask_in(told), expected)
    assert told["pixels"] == int(expected.sum())


def test_no_square_is_looked_for_in_an_image_that_is_misclassified(desk: Desk) -> None:
    exhibit = desk.bench.exhibit(0)
    predicted = int(exhibit.logits.argmax())
    desk.bench.add(exhibit.pixels, ["misclassified"], torch.tensor([(predicted + 1) % 4]))
    error = desk.ask("mask", {"image": len(desk.bench.exhibits) - 1, "kind": "weakest"}).exception(60)
    assert str(error) == (
        f"No change is needed: the image is classified as 'class of {predicted}', not as "
        f"'class of {(predicted + 1) % 4}', to begin with."
    )
    error = desk.ask("mask", {"image": 0, "kind": "weakest", "budget": "linf:1/25500"}).exception(60)
    assert str(error).startswith("no square was found")


def test_a_superpixel_is_the_piece_at_the_point(desk: Desk) -> None:
    told = ask(desk, "mask", kind="superpixel", y=12, x=9, count=12)
    pieces = regions.superpixels(desk.bench.exhibit(0).pixels, count=12)
    assert torch.equal(mask_in(told), pieces == pieces[0, 0, 12, 9])


def test_a_remark_says_what_a_mask_warns_of(desk: Desk) -> None:
    """GrabCut finds no object in noise; that class activation stands in for it must be told."""
    assert "there the background is all but the 30%" in str(ask(desk, "mask", kind="background")["remark"])
    whole = ask(desk, "mask", kind="cam", fraction=1.0)
    assert mask_in(whole).all()
    with pytest.raises(ValueError, match="the cam mask of this image is empty"):
        ask(desk, "mask", kind="cam", fraction=0)


def test_the_control_has_the_area_of_the_mask_and_its_overlap_is_told(desk: Desk) -> None:
    for mask in (square(), square(side=1), ~square(side=2), square(0, 0, 20)):
        told = ask(desk, "area", mask=png(mask), seed=3)
        control = read_mask(base64.b64decode(str(told["control"])), SIZE)
        assert int(control.sum()) == int(mask.sum()) == told["pixels"]
        assert told["overlap"] == int((control & mask).sum())
        shifted = [mask.roll((down, right), (2, 3)) for down in range(SIZE[0]) for right in range(SIZE[1])][
            1:
        ]
        overlaps = [int((other & mask).sum()) for other in shifted]
        assert any(torch.equal(control, other) for other in shifted)
        assert told["overlap"] == min(overlaps)
        assert (told["remark"] is not None) == (4 * min(overlaps) > int(mask.sum()))


def attacked(desk: Desk, **body: object) -> None:
    done = Events(
        desk, "attack", {"image": 0, "options": {"steps": 4}, "budget": "linf:32/255", **body}
    ).last()
    assert done["event"] == "done"


def test_weak_spots_send_an_estimate_and_then_every_cell(desk: Desk) -> None:
    events = Events(desk, "weak_spots", {"image": 0, "grid": 3, "verify": True})
    last = events.last()
    assert last["event"] == "done"
    (estimate,) = events.named("estimate")
    assert (estimate["tops"], estimate["lefts"]) == ([0, 8, 16, 24], [0, 7, 14, 20])
    assert array(estimate["size"]).shape == (3, 3)
    cells = events.named("cell")
    assert [(cell["row"], cell["column"]) for cell in cells] == list(itertools.product(range(3), range(3)))
    found = [float(str(cell["size"])) for cell in cells if cell["size"] is not None]
    if found:
        weakest = min(
            (cell for cell in cells if cell["size"] is not None), key=lambda cell: float(str(cell["size"]))
        )
        assert f"row {int(str(weakest['row'])) + 1}, column {int(str(weakest['column'])) + 1}" in str(
            last["sentence"]
        )
    if len(found) < 9:
        assert "does not mean that none exists" in str(last["sentence"])


def test_the_search_of_cells_stops(desk: Desk) -> None:
    events = Events(desk, "weak_spots", {"image": 0, "grid": 16, "verify": True})
    events.task.stop.set()
    assert events.last()["event"] == "done"
    assert "margin" in ask(desk, "probe", y=1, x=1)


def test_a_network_that_nothing_changes_has_no_weak_cell() -> None:
    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((1, 2, 3))[:, None] * torch.zeros(2) + torch.tensor([3.0, 0.0])

    bench = Bench(Classifier.wrap(Constant().eval(), input_size=SIZE))
    bench.add(torch.full((1, 3, *SIZE), 0.5), ["flat"])
    desk = Desk(bench)
    try:
        last = Events(desk, "weak_spots", {"image": 0, "grid": 2, "verify": True}).last()
        far = Events(desk, "weak_spots", {"image": 0, "grid": 2, "verify": True, "budget": "l2:3"}).last()
    finally:
        desk.close()
    assert "No change was found in 4 cells; this does not mean that none exists." in str(last["sentence"])
    none = "No change up to 3 in L2 was found in 4 cells; this does not mean that none exists."
    assert none in str(far["sentence"])


def test_layers_need_an_attack_and_show_a_random_edit_beside_it(desk: Desk) -> None:
    with pytest.raises(ValueError, match="attack the image first"):
        ask(desk, "layers")
    attacked(desk)
    told = ask(desk, "layers")
    layers = told["layers"]
    assert isinstance(layers, list)
    assert [layer["name"] for layer in layers] == ["1", "3"]
    one = ask(desk, "layer", layer="3")
    assert array(one["change"]).shape == array(one["random"]).shape == (12, 10)
    assert one["count"] == 8
    pair = desk.bench.exhibit(0).pair
    assert pair is not None
    network = desk.bench.classifier.network
    assert isinstance(network, nn.Sequential)
    with torch.no_grad():
        clean, changed = (network[:4](images) for images in (pair.clean, pair.adversarial))
    assert torch.allclose(array(one["change"]), (changed - clean).abs().amax(1)[0], atol=1e-5)
    mean = (changed - clean).abs().mean((0, 2, 3))
    units = one["units"]
    assert isinstance(units, list)
    assert [unit["unit"] for unit in units] == mean.argsort(descending=True).tolist()
    with pytest.raises(ValueError, match="layer must be one of 1, 3"):
        ask(desk, "layer", layer="classifier")


def test_a_unit_is_set_to_zero_as_mask_units_does_it(desk: Desk) -> None:
    attacked(desk)
    pair, label = desk.bench.exhibit(0).pair, desk.bench.exhibit(0).label_tensor
    assert pair is not None
    told = ask(desk, "unit", layer="3", unit=2)
    masked = mask_units(desk.bench.classifier, "3", [2])
    for name, image in (("clean", pair.clean), ("adversarial", pair.adversarial)):
        with torch.no_grad():
            expected = float(margin(masked(image), label))
            whole = float(margin(desk.bench.classifier(image), label))
        assert told["without"][name]["margin"] == pytest.approx(expected, abs=1e-4)  # type: ignore[index]
        assert told["with"][name]["margin"] == pytest.approx(whole, abs=1e-4)  # type: ignore[index]
    others = told["others"]
    assert isinstance(others, list)
    assert len(others) == 5
    assert 2 not in [other["unit"] for other in others]
    with pytest.raises(ValueError, match="unit must be an integer between 0 and 7"):
        ask(desk, "unit", layer="3", unit=8)


def test_a_unit_of_a_module_that_is_called_twice_is_changed_in_one_call_only() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.relu, self.head = nn.ReLU(), nn.Linear(4, 2)

        def forward(self, images: Tensor) -> Tensor:
            maps = self.relu(self.second(self.relu(self.first(images))))
            logits: Tensor = self.head(maps.mean((2, 3)))
            return logits

    torch.manual_seed(0)
    network = Twice().eval()
    bench = Bench(Classifier.wrap(network, input_size=SIZE))
    bench.add(torch.rand(1, 3, *SIZE), ["one"])
    desk = Desk(bench)
    try:
        attacked(desk)
        told = ask(desk, "unit", layer="relu (call 2)", unit=1)
        exhibit = bench.exhibit(0)
        with torch.no_grad():
            maps = network.relu(network.second(network.relu(network.first(exhibit.pixels))))
            maps[:, 1] = 0
            expected = float(margin(network.head(maps.mean((2, 3))), exhibit.label_tensor))
    finally:
        desk.close()
    assert told["without"]["clean"]["margin"] == pytest.approx(expected, abs=1e-4)  # type: ignore[index]


def test_units_are_shown_with_the_concepts_that_a_dissection_found(desk: Desk, tmp_path: Path) -> None:
    table = "layer,unit,concept,category,iou\n3,2,striped,texture,0.123\n3,4,,,\n1,0,red,color,0.5\n"
    (tmp_path / "scores.csv").write_text(table, "utf-8")
    desk.bench.concepts = read_concepts(tmp_path)
    assert desk.bench.concepts == {("3", 2): "striped (IoU 0.12)", ("1", 0): "red (IoU 0.5)"}
    attacked(desk)
    assert ask(desk, "unit", layer="3", unit=2)["concept"] == "striped (IoU 0.12)"
    assert ask(desk, "unit", layer="3", unit=4)["concept"] is None
    units = ask(desk, "layer", layer="3")["units"]
    assert isinstance(units, list)
    assert {unit["unit"]: unit["concept"] for unit in units}[2] == "striped (IoU 0.12)"


@pytest.mark.parametrize("table", ["", "image,success\na,True\n", "\x00\x01", "layer,unit\n1,0\n"])
def test_a_table_that_is_no_dissection_is_told(tmp_path: Path, table: str) -> None:
    with pytest.raises(FileNotFoundError, match="must be a folder that weakspot dissect wrote"):
        read_concepts(tmp_path)
    (tmp_path / "scores.csv").write_text(table, "utf-8")
    with pytest.raises(ValueError, match="must be the table of a dissection"):
        read_concepts(tmp_path)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_network_answers_everything(name: str) -> None:
    """Gray, two classes, not square, tokens, without layers: an answer or one sentence, and the desk lives on."""
    model, images = NETWORKS[name]()
    bench = Bench(model if isinstance(model, Classifier) else Classifier.wrap(model))
    bench.add(images[:1], ["one"])
    desk = Desk(bench)
    size = (int(images.shape[2]), int(images.shape[3]))
    mask = png(square(1, 1, 4, size))
    try:
        done = Events(desk, "attack", {"image": 0, "mask": mask, "options": {"steps": 2}}).last()
        assert done["event"] == "done", done
        answered = []
        for request, body in (
            ("probe", {"y": 2, "x": 2}),
            ("undo_place", {"mask": mask}),
            ("layers", {}),
            ("mask", {"kind": "cam"}),
            ("mask", {"kind": "background"}),
        ):
            error = desk.ask(request, {"image": 0, **body}).exception(60)
            answered.append(error is None)
            assert error is None or not str(error).startswith("the request failed"), (request, error)
        jobs: list[tuple[str, Message]] = [
            ("explain", {"analysis": "overlap"}),
            ("explain", {"analysis": "cam"}),
            ("certify", {"mask": mask, "seconds": 5}),
        ]
        for job, order in jobs:
            last = Events(desk, job, {"image": 0, **order}).last()
            answered.append(last["event"] == "done")
            assert not str(last.get("error", "")).startswith("the request failed"), (job, last)
    finally:
        desk.close()
    assert answered.count(True) >= 3
