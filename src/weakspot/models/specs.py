"""Models from one string: installed models, factories, exported archives, trained folders and hubs."""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from weakspot._checks import ModelWarning, quiet, unknown_choice
from weakspot._errors import contain_exits, first_line
from weakspot._network_config import image_channels
from weakspot._plug_ins import entry_points
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
    """Load a classifier in eval mode.

    Args:
        spec: "efficientnet_lite0" (embedded), "package.module:factory", "model.pt2" (torch.export), a folder that
            `weakspot train` wrote, "hf:DIRECTORY", "timm:NAME", "torchvision:NAME"; or a module; or a function without
            arguments that returns one.
        weights: path of a .safetensors file, or of a state dict that torch.load reads with weights_only=True.
        device: "auto" (CUDA, then MPS, then CPU), or any torch device.
        mean: of the normalization, on the [0, 1] scale of images; replaces the model's own.
        std: of the normalization; replaces the model's own.
        input_size: (height, width); replaces the model's own.
        class_names: one per class; replace the model's own.

    Raises:
        ValueError: if the spec is not valid, a package is not installed, or the weights do not fit.
        FileNotFoundError: if a file does not exist.
    """
    # A hub's warning that it does not know the normalization is not true if the caller states it.
    stated = nullcontext() if mean is None or std is None else quiet(ModelWarning)
    with stated, contain_exits(f"model {spec}" if isinstance(spec, str) else "the model's factory"):
        network = _from_name(spec) if isinstance(spec, str) else _call_factory(spec, spec)
    classifier = network if isinstance(network, Classifier) else Classifier(network)
    if any(value is not None for value in (mean, std, input_size, class_names)):
        given = classifier
        classifier = Classifier(
            classifier.network,
            mean=classifier.mean.flatten().tolist() if mean is None else mean,
            std=classifier.std.flatten().tolist() if std is None else std,
            input_size=input_size or classifier.input_size,
            class_names=class_names or classifier.class_names,
            name=classifier.name,
        )
        found = image_channels(given.network, given.mean.numel(), given.input_size)
        if given.channels != found and classifier.mean.numel() == 1:
            classifier.channels = given.channels  # set by hand
    if weights is not None:
        _load_weights(classifier.network, Path(weights))
    for module in classifier.modules():  # exported modules refuse .eval()
        module.training = False
    return classifier.to(find_device(device))


def plain_pixels_note(spec: str, classifier: Classifier, remedy: str) -> str | None:
    """A sentence if a network of the user's gets pixels that are not normalized, which may be a mistake.

    Args:
        spec: as `load` takes it.
        classifier: loaded from it, without a mean and std from the caller.
        remedy: how to give them.
    """
    if bool((classifier.mean != 0).any() or (classifier.std != 1).any()) or not _is_own(spec):
        return None
    return (
        f"{spec} gets pixels in [0, 1] as they are ({remedy} unless it normalizes them itself or was trained on such "
        "pixels)"
    )


def _is_own(spec: str) -> bool:
    """Whether nothing but the user knows how images are normalized: not a network of weakspot or of a hub."""
    if is_trained(Path(spec)):
        return False
    source, colon, _ = spec.partition(":")
    if spec.endswith(".pt2") or colon:
        return source not in HUBS
    return not any(entry.value.startswith("weakspot.") for entry in entry_points(group=GROUP, name=spec))


def available_models() -> list[str]:
    """Names of installed models, from the entry-point group "weakspot.models"."""
    return sorted(entry.name for entry in entry_points(group=GROUP))


def find_device(device: str) -> torch.device:
    """The device of a name; "auto" is CUDA, then MPS, then the CPU.

    Raises:
        ValueError: if this machine has no such device.
    """
    if device == "auto":
        backends = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        return torch.device(next(name for name, available in backends.items() if available))
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or mps, got {device!r}") from None
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {device} is not available on this machine (use auto or cpu; torch {torch.__version__} says: "
            f"{first_line(error)[:100]})"
        ) from None
    return chosen


def _from_name(spec: str) -> nn.Module:
    if is_trained(Path(spec)):
        return from_training(Path(spec))
    if spec.endswith(".pt2"):
        return load_exported(Path(spec))
    if Path(spec).suffix in {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".safetensors"}:
        raise ValueError(
            f"model must name a network, got the weights {spec} (name the network with --model and give this file as "
            "--weights)"
        )
    source, colon, name = spec.partition(":")
    if colon and source in HUBS:
        return HUBS[source](name)
    if colon:
        return _call_factory(find_factory(source, name), spec)
    entries = entry_points(group=GROUP, name=spec)
    for entry in entries:
        return _call_factory(entry.load(), spec)
    raise ValueError(unknown_choice("model", spec, available_models(), remedy=f"or give {FORMS}"))


def find_factory(module_name: str, name: str, *, kind: str = "model", forms: str = FORMS) -> object:
    """Import `module_name.name`, also from the working directory, as `python -m` does.

    Args:
        module_name: a dotted name.
        name: of an attribute of the module.
        kind: of object, for messages.
        forms: of valid specs, for messages.

    Raises:
        ValueError: if there is no such module or attribute.
    """
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(
            f"{kind} {module_name}:{name} must be in a module of yours, got {module_name}, which is part of Python "
            f"(valid are {forms})"
        )
    if module_name.endswith(".py"):
        path = Path(module_name).with_suffix("")
        dotted = all(part.isidentifier() for part in path.parts)
        remedy = f"{'.'.join(path.parts)}:{name}" if dotted else f"{path.name}:{name} in its folder"
        raise ValueError(f"{kind} must name a module, not a file, got {module_name}:{name} (write {remedy})")
    # Last, so that a file of this folder cannot take the place of an installed module.
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except (TypeError, ValueError):
        raise ValueError(
            f"{kind} {module_name}:{name} must start with the name of a module (valid are {forms})"
        ) from None
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{kind} {module_name}:{name}: there is no module {error.name!r} in this folder or installed (valid are "
            f"{forms})"
        ) from None
    if not hasattr(module, name):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(unknown_choice(f"{kind} in {module_name}", name, public))
    value: object = getattr(module, name)
    return value


def _call_factory(factory: object, spec: object) -> nn.Module:
    network = factory
    # A module can be called too, but that would be a forward pass.
    if callable(factory) and not isinstance(factory, nn.Module):
        _check_no_arguments(factory, spec)
        network = factory()
    if inspect.isclass(network) or not isinstance(network, nn.Module):
        raise ValueError(
            f"model {spec} must be a torch.nn.Module or a function without arguments that returns one, got "
            f"{type(network).__name__}"
        )
    return network


def _check_no_arguments(factory: Callable[..., object], spec: object) -> None:
    try:
        signature = inspect.signature(factory)
    except (ValueError, TypeError):  # some functions written in C have none
        return
    needed = [
        name
        for name, one in signature.parameters.items()
        if one.default is one.empty and one.kind not in {one.VAR_POSITIONAL, one.VAR_KEYWORD}
    ]
    if needed:
        raise ValueError(
            f"model {spec} must be a function without arguments that returns a torch.nn.Module, got one that needs "
            f"{' and '.join(needed)}"
        )


def _load_weights(network: nn.Module, path: Path) -> None:
    """Load the tensors of a file into the network; code in the file is never run."""
    if not path.is_file():
        raise FileNotFoundError(f"weights must be a file, got {path}, which does not exist")
    state = _read_state(path)
    own = network.state_dict()
    # Training wrappers (DataParallel, Lightning, torch.compile) put a prefix before every name.
    spellings = [
        {key.removeprefix(prefix): value for key, value in state.items()}
        for prefix in ("", "module.", "model.", "_orig_mod.", "network.")
    ]
    stripped = max(spellings, key=lambda spelling: len(own.keys() & spelling.keys()))
    # Old files have no counter of batches, which eval mode does not read.
    missing = sorted(
        own.keys() - stripped.keys() - {key for key in own if key.endswith("num_batches_tracked")}
    )
    if missing:
        raise ValueError(
            f"{path} does not fit the model: it lacks {len(missing)} of the model's {len(own)} tensors, for example "
            f"{missing[0]} (it has {next(iter(state), 'nothing')})"
        )
    for key, tensor in own.items():
        if key in stripped and stripped[key].shape != tensor.shape:
            raise ValueError(
                f"{path} does not fit the model: {key} must have shape {tuple(tensor.shape)}, got "
                f"{tuple(stripped[key].shape)}"
            )
    network.load_state_dict({key: stripped[key] for key in own if key in stripped}, strict=False)


def _read_state(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read as a safetensors file ({error})") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises many kinds of errors for the same reason
        raise ValueError(
            f"{path} must be a .safetensors file or a state dict saved by torch.save, got {type(error).__name__} while "
            "reading (files that need full unpickling are refused because they can run code)"
        ) from None
    # Checkpoints of a training hold the weights beside other entries.
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ValueError(f"{path} must hold a state dict, names with tensors, got {type(state).__name__}")
    return state
