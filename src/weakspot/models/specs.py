"""Model specs: one string names a network, whatever it comes from.

Settings: what a network's modules hold besides tensors and parts, as far as it can be written down.

Fingerprint: a short name of a network's weights.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from weakspot._checks import contain_exits, entry_points, unknown_choice
from weakspot.classifier import Classifier
from weakspot.models.embedded import from_training, is_trained
from weakspot.models.exported import load_exported
from weakspot.models.hubs import HUBS

GROUP = "weakspot.models"
FORMS = (
    "NAME of an installed model (see `weakspot models`), package.module:factory, model.pt2, a folder that "
    "`weakspot train` wrote, hf:DIRECTORY, timm:NAME or torchvision:NAME"
)


def load(
    spec: str | nn.Module | Callable[[], nn.Module],
    *,
    weights: Path | str | None = None,
    device: str = "auto",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: tuple[int, int] | None = None,
    class_names: Sequence[str] | None = None,
) -> Classifier:
    """A classifier in eval mode from a spec, a module or a function that makes one.

    Args:
        spec: "efficientnet_lite0" (embedded), "package.module:factory", "model.pt2" (torch.export),
            "hf:DIRECTORY", "timm:NAME", "torchvision:NAME"; or a module; or a function without arguments.
        weights: a .safetensors file, or a state dict that torch.load reads with weights_only=True.
        device: "auto" (CUDA, then MPS, then CPU), or any torch device.
        mean: normalization on the [0, 1] scale, in place of what the model brings.
        std: likewise.
        input_size: (height, width), in place of what the model brings.
        class_names: in place of what the model brings.

    Raises:
        ValueError: when the spec cannot be understood, what it needs is not installed, or weights do not fit.
        FileNotFoundError: when a file is not there.
    """
    with contain_exits(f"model {spec}" if isinstance(spec, str) else "the model's factory"):
        made = (
            spec
            if isinstance(spec, nn.Module)
            else _from_name(spec)
            if isinstance(spec, str)
            else _made_by(spec, spec)
        )
    classifier = made if isinstance(made, Classifier) else Classifier(made)
    if any(value is not None for value in (mean, std, input_size, class_names)):
        classifier = Classifier(
            classifier.network,
            mean=classifier.mean.flatten().tolist() if mean is None else mean,
            std=classifier.std.flatten().tolist() if std is None else std,
            input_size=input_size or classifier.input_size,
            class_names=class_names or classifier.class_names,
            name=classifier.name,
        )
    if weights is not None:
        _load_weights(classifier.network, Path(weights))
    for module in classifier.modules():
        module.training = False
    return classifier.to(find_device(device))


def available_models() -> list[str]:
    """Names of installed models, from the entry-point group "weakspot.models"."""
    return sorted(entry.name for entry in entry_points(group=GROUP))


def find_device(device: str) -> torch.device:
    """The device of that name; "auto" is the fastest there is.

    Raises:
        ValueError: when there is no such device here.
    """
    if device == "auto":
        backends = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        return torch.device(next(name for name, there in backends.items() if there))
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(
            f"device is {device!r}, which is not to be had here; accepted: auto, cpu, cuda, mps"
        ) from None
    return found


def _from_name(spec: str) -> nn.Module:
    if is_trained(Path(spec)):
        return from_training(Path(spec))
    if spec.endswith(".pt2"):
        return load_exported(Path(spec))
    if Path(spec).suffix in {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".safetensors"}:
        raise ValueError(
            f"{spec} holds weights, which do not say what network they belong to; name the network with --model and "
            "give this file as --weights"
        )
    source, colon, name = spec.partition(":")
    if colon and source in HUBS:
        return HUBS[source](name)
    if colon:
        return _made_by(find_factory(source, name), spec)
    entries = entry_points(group=GROUP, name=spec)
    for entry in entries:
        return _made_by(entry.load(), spec)
    raise ValueError(unknown_choice("model", spec, available_models(), remedy=f"or give {FORMS}"))


def find_factory(module_name: str, name: str, *, kind: str = "model", forms: str = FORMS) -> Any:
    """`module_name.name`, looked for in the working directory too, as `python -m` does.

    Args:
        module_name: a dotted name.
        name: what to take of it.
        kind: what errors call it.
        forms: what errors say is accepted.

    Raises:
        ValueError: when there is no such module or it has no such name.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (TypeError, ValueError):
        raise ValueError(
            f"{kind} {module_name}:{name}: {module_name!r} is no module's name; {forms} are accepted"
        ) from None
    except ModuleNotFoundError as error:
        why = f"there is no module {error.name!r}"
        raise ValueError(
            f"{kind} {module_name}:{name}: {why} here or installed; {forms} are accepted"
        ) from None
    if not hasattr(module, name):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(unknown_choice(f"{kind} in {module_name}", name, public))
    return getattr(module, name)


def _made_by(factory: Any, spec: Any) -> nn.Module:
    made = factory if isinstance(factory, nn.Module) else factory() if callable(factory) else factory
    if inspect.isclass(made) or not isinstance(made, nn.Module):
        raise ValueError(
            f"model {spec}: made a {type(made).__name__}; accepted is a torch.nn.Module or a function without "
            "arguments that returns one"
        )
    return made


def _load_weights(network: nn.Module, path: Path) -> None:
    """Fill the network with the tensors in `path`; nothing in the file is ever run."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of weights")
    state = _read_state(path)
    own = network.state_dict()
    # Training wrappers (DataParallel, Lightning, torch.compile) put a word before every name.
    spellings = [
        {key.removeprefix(prefix): value for key, value in state.items()}
        for prefix in ("", "module.", "model.", "_orig_mod.", "network.")
    ]
    stripped = max(spellings, key=lambda spelling: len(own.keys() & spelling.keys()))
    missing = sorted(
        own.keys() - stripped.keys() - {key for key in own if key.endswith("num_batches_tracked")}
    )
    if missing:
        raise ValueError(
            f"{path} does not fit the model: {len(missing)} of its {len(own)} tensors are not in the file, "
            f"{missing[0]} for one (the file has {next(iter(state), 'nothing')})"
        )
    for key, tensor in own.items():
        if key in stripped and stripped[key].shape != tensor.shape:
            raise ValueError(
                f"{path} does not fit the model: {key} is {tuple(stripped[key].shape)} in the file and "
                f"{tuple(tensor.shape)} in the model"
            )
    network.load_state_dict({key: stripped[key] for key in own if key in stripped}, strict=False)


def _read_state(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file ({error})") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises a dozen kinds; each means the same to the user
        raise ValueError(
            f"{path} cannot be read as plain tensors, and files that need unpickling are refused because they can run "
            f"code; accepted are .safetensors and state dicts saved by torch.save ({type(error).__name__})"
        ) from None
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ValueError(
            f"{path} holds a {type(state).__name__} and not names with tensors; accepted is a state dict"
        )
    return state


PLAIN = (bool, int, float, complex, str, bytes, type(None))


def settings(network: nn.Module) -> list[tuple[str, str, list[tuple[str, object]]]]:
    """Of every module its name, its class, and its attributes that are numbers, words, or lists of such."""
    found = []
    for name, module in network.named_modules():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        plain = [(key, value) for key, value in vars(module).items() if key != "training" and _plain(value)]
        found.append((name, kind, plain))
    return found


def _plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(_plain(key) and _plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    return isinstance(value, PLAIN)


def fingerprint(model: nn.Module) -> str:
    """Sixteen hex digits that change with any weight: SHA-256 over names, shapes and bytes of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(plain.shape)} {plain.dtype}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
