"""Exported models: a .pt2 archive gives the network it was made of, and never runs what a stranger put in it."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.networks import Made, untouched
from weakspot.models import exported as exported_archives
from weakspot.models import load
from weakspot.models.exported import load_exported

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"

Change = Callable[[bytes], bytes]


class Small(nn.Module):
    """A convolution, batch-norm and a linear layer: parameters, buffers and nothing that depends on the size."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, 2, 1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.norm(self.convolution(images))).mean((2, 3)))
        return logits


class Preprocessed(nn.Module):
    """Pads, resizes and adds a constant tensor on the way: sizes become expressions."""

    def __init__(self) -> None:
        super().__init__()
        self.small = Small()

    def forward(self, images: Tensor) -> Tensor:
        even = F.pad(images, (0, images.shape[3] % 2, 0, images.shape[2] % 2))
        halved = F.adaptive_avg_pool2d(F.avg_pool2d(even, 2), (6, 6))
        logits: Tensor = self.small(halved + torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1))
        return logits


def exported(
    path: Path, network: nn.Module, images: Tensor, dynamic: Mapping[int, Any] | None = None
) -> Path:
    program = torch.export.export(
        network, (images,), dynamic_shapes=None if dynamic is None else (dict(dynamic),)
    )
    torch.export.save(program, path)
    return path


def seeded(network: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return network().eval()


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return seeded(Small)


@pytest.fixture(scope="module")
def archive(small: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good archive of `small`, for any number of images of 3 x 16 x 16."""
    path = tmp_path_factory.mktemp("exported") / "small.pt2"
    return exported(path, small, torch.rand(2, 3, 16, 16), {0: torch.export.Dim("batch")})


@pytest.fixture
def images() -> Tensor:
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- good archives


@pytest.mark.parametrize("batch", ["any", 1, 2])
def test_an_exported_network_gives_the_originals_logits_and_gradients_for_every_batch(
    tmp_path: Path, any_model: Made, batch: str | int
) -> None:
    original, images = any_model
    if batch == "any" and any(isinstance(module, nn.TransformerEncoder) for module in original.modules()):
        pytest.skip("torch.export fixes the batch size of nn.TransformerEncoder")
    dynamic = {0: torch.export.Dim("batch")} if batch == "any" else None
    path = exported(tmp_path / "model.pt2", original, images[: 2 if batch == "any" else int(batch)], dynamic)
    classifier = load(str(path), device="cpu")
    for count in (1, 3, 5):
        asked = torch.cat([images, 1 - images])[:count].requires_grad_()
        logits, expected = classifier(asked), original(asked)
        torch.testing.assert_close(logits, expected)
        found, wanted = (
            torch.autograd.grad(output.square().sum(), asked)[0] for output in (logits, expected)
        )
        torch.testing.assert_close(found, wanted)
        assert bool((found.flatten(1) != 0).any(1).all())


def test_a_network_for_one_batch_size_sees_each_image_alone(
    tmp_path: Path, small: nn.Module, images: Tensor
) -> None:
    network = load_exported(exported(tmp_path / "three.pt2", small, images[:3]))
    with torch.no_grad():
        together = network(images)
        for index in range(len(images)):
            torch.testing.assert_close(network(images[index, None])[0], together[index])


@pytest.mark.parametrize("build", [Small, Preprocessed])
def test_a_network_for_any_size_takes_any_size(tmp_path: Path, build: Callable[[], nn.Module]) -> None:
    original = seeded(build)
    height, width = torch.export.Dim("height", min=12, max=64), torch.export.Dim("width", min=12, max=64)
    dynamic = {0: torch.export.Dim("batch"), 2: height, 3: width}
    path = exported(tmp_path / "model.pt2", original, torch.rand(2, 3, 16, 18), dynamic)
    classifier = load(str(path), device="cpu")
    for size in ((1, 3, 16, 18), (3, 3, 13, 40), (2, 3, 64, 12)):
        pictures = torch.rand(size)
        torch.testing.assert_close(classifier(pictures), original(pictures))


def test_mean_and_std_go_before_an_exported_network(archive: Path, small: nn.Module, images: Tensor) -> None:
    classifier = load(
        str(archive), device="cpu", mean=[0.5, 0.4, 0.3], std=[0.25], class_names=["a", "b", "c"]
    )
    normalized = (images - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / 0.25
    torch.testing.assert_close(classifier(images), small(normalized))
    assert classifier.class_name(2) == "c"


def test_other_weights_of_the_same_network_can_be_given(
    archive: Path, images: Tensor, tmp_path: Path
) -> None:
    trained = Small().eval()
    torch.save(trained.state_dict(), tmp_path / "trained.pt")
    classifier = load(str(archive), weights=tmp_path / "trained.pt", device="cpu")
    torch.testing.assert_close(classifier(images), trained(images))


def test_reading_an_archive_draws_no_random_numbers(archive: Path, small: nn.Module, images: Tensor) -> None:
    with untouched(small, images):
        network = load_exported(archive)
    assert isinstance(network, nn.Module)


def test_a_compressed_archive_is_an_archive(
    archive: Path, small: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    with (
        zipfile.ZipFile(archive) as source,
        zipfile.ZipFile(tmp_path / "z.pt2", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in source.namelist():
            packed.writestr(name, source.read(name))
    torch.testing.assert_close(load_exported(tmp_path / "z.pt2")(images), small(images))


def test_a_network_of_two_inputs_is_refused(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, images: Tensor, mask: Tensor) -> Tensor:
            return (images * mask).flatten(1)

    program = torch.export.export(Two(), (torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)))
    torch.export.save(program, tmp_path / "two.pt2")
    with pytest.raises(
        ValueError, match=r"two\.pt2 must be a network of one input, the images, got 2 inputs"
    ):
        load_exported(tmp_path / "two.pt2")


# ---------------------------------------------------------------- archives that would run code


def rebuilt(
    source: Path,
    target: Path,
    changes: Mapping[str, Change] | None = None,
    *,
    renamed: Mapping[str, str] | None = None,
    added: Mapping[str, bytes] | None = None,
) -> Path:
    """A copy of an archive, entry by entry, with some changed, renamed or added."""
    changes, renamed, added = changes or {}, renamed or {}, added or {}
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].split("/")[0]
        for entry in old.namelist():
            name = entry.removeprefix(f"{root}/")
            content = changes.get(name, bytes)(old.read(entry))
            new.writestr(f"{root}/{renamed.get(name, name)}", content)
        for name, content in added.items():
            new.writestr(f"{root}/{name}", content)
    return target


def rewritten(old: str, new: str) -> Change:
    """The entry with one JSON string in place of another, wherever it stands."""

    def change(content: bytes) -> bytes:
        before, after = json.dumps(old).encode(), json.dumps(new).encode()
        assert before in content
        return content.replace(before, after)

    return change


def edited(edit: Callable[[Any], Any]) -> Change:
    """The entry with its JSON edited in place."""

    def change(content: bytes) -> bytes:
        tree = json.loads(content)
        edit(tree)
        return json.dumps(tree).encode()

    return change


class Malicious:
    """A pickle that opens a file as soon as it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.trace), "w")


def malicious(trace: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save((Malicious(trace),), buffer)
    return buffer.getvalue()


def call(trace: Path) -> str:
    """An expression that leaves a file behind when it is evaluated."""
    return f"__import__('os').system('touch {trace}')"


def expression(text: str) -> Change:
    """The model with its batch size's expression replaced."""

    def edit(tree: Any) -> None:
        images = tree["graph_module"]["graph"]["tensor_values"]["images"]
        images["sizes"][0]["as_expr"]["expr_str"] = text

    return edited(edit)


def guarded(text: str) -> Change:
    return edited(lambda tree: tree["guards_code"].append(text))


def node(tree: Any, index: int = 0) -> Any:
    return tree["graph_module"]["graph"]["nodes"][index]


def aimed(target: str) -> Change:
    return edited(lambda tree: node(tree).update(target=target))


def signed(edit: Callable[[Any], Any]) -> Change:
    """The model with the signature of its call edited."""
    return edited(lambda tree: edit(tree["graph_module"]["module_call_graph"][0]["signature"]))


def shaped(kind: str, context: Any) -> Change:
    """The model with another container said to hold its output."""
    spec = [1, {"type": kind, "context": context, "children_spec": []}]
    return signed(lambda signature: signature.update(out_spec=json.dumps(spec)))


def opaque(name: str) -> Change:
    """The constants with one that lies in an entry of that name."""
    meta = {
        "dtype": 1,
        "sizes": [{"as_int": 1}],
        "requires_grad": False,
        "device": {"type": "cpu", "index": None},
        "strides": [{"as_int": 1}],
        "storage_offset": {"as_int": 0},
        "layout": 7,
    }
    entry = {"path_name": name, "is_param": False, "use_pickle": False, "tensor_meta": meta}
    return edited(lambda tree: tree["config"].update(extra=entry))


def file_written(trace: Path) -> Change:
    """The model with an operator first that maps a file, and creates it."""

    def edit(tree: Any) -> None:
        graph = tree["graph_module"]["graph"]
        like = node(tree, 2)
        arguments = {
            "filename": {"as_string": str(trace)},
            "shared": {"as_bool": True},
            "size": {"as_int": 4},
        }
        graph["tensor_values"]["mapped"] = json.loads(
            json.dumps(graph["tensor_values"]["p_convolution_bias"])
        )
        graph["tensor_values"]["mapped"]["requires_grad"] = False
        graph["nodes"].insert(
            0,
            {
                **like,
                "target": "torch.ops.aten.from_file.default",
                "inputs": [{"name": name, "arg": value, "kind": 1} for name, value in arguments.items()],
                "outputs": [{"as_tensor": {"name": "mapped"}}],
                "name": "mapped",
            },
        )

    return edited(edit)


def quoted(trace: Path) -> str:
    """A name that ends the string it is printed in, without a dot or a space that would be changed."""
    command = "".join(f"chr({ord(letter)})+" for letter in f"touch {trace}") + "chr(32)"
    return f'a", getattr(__import__("os"), "system")({command}) or "b'


ATTACKS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "sample inputs are a pickle": lambda trace: {"changes": {SAMPLES: lambda _: malicious(trace)}},
    "sample inputs are a bare pickle": lambda trace: {
        "changes": {SAMPLES: lambda _: pickle.dumps(Malicious(trace))}
    },
    "weights as pickles": lambda trace: {
        "changes": {
            WEIGHTS: edited(lambda tree: tree["config"]["head.bias"].update(use_pickle=True)),
            **{f"data/weights/weight_{index}": lambda _: malicious(trace) for index in range(9)},
        }
    },
    "weights of an old format": lambda trace: {"added": {"data/weights/model.pt": malicious(trace)}},
    "constants of an old format": lambda trace: {"added": {"data/constants/model.pt": malicious(trace)}},
    "a custom object": lambda trace: {
        "changes": {CONSTANTS: opaque("custom_obj_0")},
        "added": {"data/constants/custom_obj_0": malicious(trace)},
    },
    "an opaque object": lambda trace: {
        "changes": {CONSTANTS: opaque("opaque_obj_0")},
        "added": {"data/constants/opaque_obj_0": pickle.dumps(Malicious(trace))},
    },
    "an opaque object in capitals": lambda trace: {  # torch finds entries whatever their case
        "changes": {CONSTANTS: opaque("opaque_obj_0")},
        "added": {"data/constants/OPAQUE_OBJ_0": pickle.dumps(Malicious(trace))},
    },
    "a pickle in capitals": lambda trace: {
        "changes": {SAMPLES: lambda _: malicious(trace)},
        "renamed": {SAMPLES: "data/sample_inputs/model.PT"},
    },
    "a model that is not called .json": lambda trace: {  # torch takes any entry under models/
        "changes": {MODEL: expression(call(trace))},
        "renamed": {MODEL: "models/model.JSON"},
    },
    "compiled code": lambda trace: {"added": {"data/extra/kernel.so": b"\x7fELF"}},
    "compiled kernels": lambda trace: {"added": {"data/aotinductor/model/kernel.cpp": b"int main() {}"}},
    "a call as an expression": lambda trace: {"changes": {MODEL: expression(call(trace))}},
    "a method as an expression": lambda trace: {
        "changes": {MODEL: expression(f"().__class__.__base__.__subclasses__()[0].{call(trace)}")}
    },
    "a lambda as an expression": lambda trace: {"changes": {MODEL: expression(f"(lambda: {call(trace)})()")}},
    "a call as a guard": lambda trace: {"changes": {MODEL: guarded(call(trace))}},
    "a guard that ends its own message": lambda trace: {
        "changes": {MODEL: guarded(f"""True == " + str({call(trace)}) + \"""")}
    },
    "a node that is a function": lambda trace: {"changes": {MODEL: aimed("os.system")}},
    "a node that is a function torch imports": lambda trace: {"changes": {MODEL: aimed("torch.os.system")}},
    "a node that is a call": lambda trace: {"changes": {MODEL: aimed("_operator.methodcaller")}},
    "a node under an operator": lambda trace: {
        "changes": {MODEL: aimed("torch.ops.aten.__class__.__subclasses__")}
    },
    "a node of a stranger's extension": lambda trace: {"changes": {MODEL: aimed("#mine:system")}},
    "a node that writes a file": lambda trace: {"changes": {MODEL: file_written(trace)}},
    "an input named like code": lambda trace: {
        "changes": {MODEL: rewritten("images", f"images={call(trace)}")}
    },
    "a parameter named like code": lambda trace: {
        "changes": {entry: rewritten("head.weight", quoted(trace)) for entry in (MODEL, WEIGHTS)}
    },
    "a module to import for a container": lambda trace: {
        "changes": {MODEL: shaped("builtins.list", '{"__enum__": 1, "fqn": "planted:Kind", "name": "ONE"}')}
    },
    "a module to import for a default": lambda trace: {
        "changes": {
            MODEL: shaped(
                "collections.defaultdict",
                {"default_factory_module": "planted", "default_factory_name": "Kind", "dict_context": []},
            )
        }
    },
} | {
    f"a string that {function} evaluates": lambda trace, function=function, rest=rest: {  # type: ignore[misc]
        "changes": {MODEL: expression(f"{function}({call(trace)!r}{rest})")}
    }
    for function, rest in [
        ("floor", ""),
        ("ceiling", ""),
        ("Abs", ""),
        ("Identity", ""),
        ("Max", ", 2"),
        ("Min", ", 2"),
        ("Mod", ", 2"),
        ("FloorDiv", ", 2"),
    ]
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_an_archive_that_would_run_code_is_refused_and_nothing_runs(
    tmp_path: Path,
    archive: Path,
    images: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    attack: Callable[[Path], dict[str, Any]],
) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "planted.py").write_text(f"import pathlib\nKind = pathlib.Path({str(trace)!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "planted", raising=False)
    path = rebuilt(archive, tmp_path / "attack.pt2", **attack(trace))
    error: Exception | None = None
    try:
        load_exported(path)(images)
    except Exception as raised:  # noqa: BLE001 - whatever it is, the trace counts first
        error = raised
    assert not trace.exists(), f"the archive's code ran; {error!r}"
    assert isinstance(error, ValueError), f"not refused but {error!r}"
    assert "attack.pt2" in str(error)


def test_the_archive_that_was_inspected_is_the_one_that_is_read(tmp_path: Path, archive: Path) -> None:
    """Two archives in one file: Python finds the directory before the end, torch the one at the offset."""
    trace = tmp_path / "trace"
    good = rebuilt(archive, tmp_path / "good.pt2").read_bytes()
    bad = rebuilt(archive, tmp_path / "bad.pt2", {SAMPLES: lambda _: malicious(trace)}).read_bytes()

    def directory(content: bytes) -> tuple[int, int]:
        end = content.rindex(b"PK\x05\x06")
        return struct.unpack("<I", content[end + 16 : end + 20])[0], end

    (bad_at, bad_end), (good_at, _) = directory(bad), directory(good)
    assert bad_at <= good_at
    both = bad[:bad_at] + bytes(good_at - bad_at) + bad[bad_at:bad_end] + good
    (tmp_path / "both.pt2").write_bytes(both)
    with zipfile.ZipFile(tmp_path / "both.pt2") as seen:
        assert seen.testzip() is None
        assert seen.read("small/" + SAMPLES) != malicious(trace)
    try:
        load_exported(tmp_path / "both.pt2")
    except ValueError as error:
        assert "both.pt2" in str(error)  # noqa: PT017 - to refuse it is as good as to read the archive inspected
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_are_refused(tmp_path: Path, archive: Path) -> None:
    path = rebuilt(archive, tmp_path / "twice.pt2", added={SAMPLES: malicious(tmp_path / "trace")})
    with pytest.raises(ValueError, match=r"twice\.pt2 is refused: it holds two entries of one name"):
        load_exported(path)


def test_the_format_of_old_torch_is_refused_when_it_would_run_code(tmp_path: Path, archive: Path) -> None:
    trace = tmp_path / "trace"
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(tmp_path / "old.pt2", "w") as old:
        (model,) = (name for name in source.namelist() if name.endswith(MODEL))
        old.writestr("version", "8.20")
        old.writestr("serialized_exported_program.json", source.read(model))
        for name in ("state_dict", "constants", "example_inputs"):
            old.writestr(f"serialized_{name}.pt", malicious(trace))
    with pytest.raises(ValueError, match=r"old\.pt2"):
        load_exported(tmp_path / "old.pt2")
    assert not trace.exists()


GUARDS = ["L['images'].size()[1] == 3", "L['images'].size()[0] >= 1 and L['images'].size()[2] <= 64"]


@pytest.mark.parametrize("guard", GUARDS)
def test_a_guard_that_is_arithmetic_is_accepted(
    tmp_path: Path, archive: Path, small: nn.Module, images: Tensor, guard: str
) -> None:
    path = rebuilt(archive, tmp_path / "guarded.pt2", {MODEL: guarded(guard)})
    torch.testing.assert_close(load_exported(path)(images), small(images))


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize(
    "content", [b"", b"this is text", b"PK\x05\x06" + bytes(18), b"PK\x03\x04 nothing", b"\xff" * 1000]
)
def test_a_file_that_is_not_an_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text.pt2").write_bytes(content)
    with pytest.raises(ValueError, match=r"text\.pt2"):
        load(str(tmp_path / "text.pt2"))


def test_a_state_dict_named_pt2_is_refused(tmp_path: Path, small: nn.Module) -> None:
    torch.save(small.state_dict(), tmp_path / "weights.pt2")
    with pytest.raises(ValueError, match=r"weights\.pt2"):
        load(str(tmp_path / "weights.pt2"))


def test_a_missing_archive_is_file_not_found(tmp_path: Path) -> None:
    for name in ("none.pt2", "."):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load_exported(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"none\.pt2 does not exist"):
        load(str(tmp_path / "none.pt2"))


def assert_refused_or_whole(path: Path, small: nn.Module, images: Tensor) -> bool:
    """True when it is refused with a ValueError; otherwise its logits must be the original's."""
    try:
        network = load_exported(path)
    except ValueError as error:
        assert path.name in str(error)  # noqa: PT017 - one of two good outcomes
        return True
    torch.testing.assert_close(network(images), small(images))
    return False


def test_an_archive_cut_anywhere_is_refused(
    tmp_path: Path, archive: Path, small: nn.Module, images: Tensor
) -> None:
    whole, path = archive.read_bytes(), tmp_path / "cut.pt2"
    for length in range(0, len(whole), len(whole) // 60):
        path.write_bytes(whole[:length])
        assert assert_refused_or_whole(path, small, images)


@pytest.mark.parametrize("packed", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_flipped_bytes_are_refused_or_change_nothing(
    tmp_path: Path, archive: Path, small: nn.Module, images: Tensor, packed: int
) -> None:
    path, dice = tmp_path / "flipped.pt2", random.Random(0)  # noqa: S311 - no secret
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(path, "w", packed) as copy:
        for name in source.namelist():
            copy.writestr(name, source.read(name))
    whole = path.read_bytes()
    refused = 0
    for _ in range(80):
        damaged = bytearray(whole)
        damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        refused += assert_refused_or_whole(path, small, images)
    assert refused > 10


def test_a_changed_weight_is_refused(tmp_path: Path, archive: Path, small: nn.Module, images: Tensor) -> None:
    whole, path = bytearray(archive.read_bytes()), tmp_path / "changed.pt2"
    weight = next(small.parameters()).detach().numpy().tobytes()
    whole[whole.index(weight) + 3] ^= 0x40  # the exponent of the first weight
    path.write_bytes(whole)
    assert assert_refused_or_whole(path, small, images)


@pytest.mark.parametrize(
    ("entry", "content"),
    [(MODEL, b"{}"), (MODEL, b"[1, 2"), (WEIGHTS, b'{"config": {}}'), (WEIGHTS, b"\xff"), (SAMPLES, b"text")],
)
def test_a_damaged_entry_is_refused_in_one_sentence_without_a_traceback(
    tmp_path: Path, archive: Path, capfd: pytest.CaptureFixture[str], entry: str, content: bytes
) -> None:
    path = rebuilt(archive, tmp_path / "damaged.pt2", {entry: lambda _: content})
    with pytest.raises(ValueError, match=r"damaged\.pt2") as refusal:
        load_exported(path)
    assert "\n" not in str(refusal.value).strip()
    assert "Traceback" not in capfd.readouterr().err


def test_a_missing_entry_is_refused_in_one_sentence_without_a_traceback(
    tmp_path: Path, archive: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = rebuilt(
        archive, tmp_path / "lacking.pt2", renamed={"data/weights/weight_0": "data/weights/weight_99"}
    )
    with pytest.raises(ValueError, match=r"lacking\.pt2") as refusal:
        load_exported(path)
    assert "warnings above" not in str(refusal.value)
    assert "Traceback" not in capfd.readouterr().err


# ---------------------------------------------------------------- bombs


def rezipped(source: Path, target: Path, name: str, content: bytes) -> Path:
    """The archive with one entry replaced, compressed."""
    with zipfile.ZipFile(source) as good, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as bad:
        for entry in good.namelist():
            bad.writestr(entry, content if entry.endswith(name) else good.read(entry))
    return target


@pytest.mark.parametrize("name", ["weights/weight_0", "models/model.json", "byteorder"])
def test_an_entry_that_grows_out_of_proportion_is_refused_before_it_is_read(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    bomb = rezipped(archive, tmp_path / "bomb.pt2", name, bytes(20_000_000))
    assert bomb.stat().st_size < 200_000
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("an entry was read"))
    with pytest.raises(ValueError, match=r"is refused: .* would grow from [\d,]+ to 20,000,000 bytes"):
        load_exported(bomb)


def test_an_archive_too_large_for_any_classifier_is_refused(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exported_archives, "LARGEST", 1000)
    with pytest.raises(ValueError, match=r"is refused: it holds [\d,]+ bytes, more than 1,000"):
        load_exported(archive)


def test_an_ordinary_archive_may_be_compressed(archive: Path, tmp_path: Path, images: Tensor) -> None:
    again = rezipped(archive, tmp_path / "small.pt2", "no entry", b"")
    assert torch.equal(load_exported(again)(images), load_exported(archive)(images))


def test_json_nested_beyond_pythons_stack_is_one_sentence(archive: Path, tmp_path: Path) -> None:
    deep = rezipped(archive, tmp_path / "deep.pt2", "models/model.json", b"[" * 100_000 + b"]" * 100_000)
    with pytest.raises(ValueError, match=r"cannot be read as an archive of torch\.export\.save"):
        load_exported(deep)
