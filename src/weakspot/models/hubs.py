"""Pretrained networks of Hugging Face transformers, timm and torchvision, if these are installed."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from weakspot._checks import ModelWarning, warn
from weakspot._errors import first_line
from weakspot.classifier import Classifier


def from_transformers(name: str) -> Classifier:
    """Load an image classifier from a directory of `save_pretrained` (safetensors) or from the hub."""
    transformers = _import("transformers", "hf:" + name)
    from_disk = Path(name).is_dir()
    if not from_disk and (name.startswith((".", "/", "~")) or not name):
        raise FileNotFoundError(
            f"hf:{name} must name a directory or a model of the hub, got no such directory"
        )
    try:
        network, report = transformers.AutoModelForImageClassification.from_pretrained(
            name,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=from_disk,
            output_loading_info=True,
        )
    except Exception as error:
        raise ValueError(
            f"hf:{name} cannot be loaded as an image classifier ({first_line(error)[:200]})"
        ) from error
    if report["missing_keys"]:
        raise ValueError(f"hf:{name} lacks weights of the network, for example {min(report['missing_keys'])}")
    config = network.config
    settings = _preprocessing(Path(name) if from_disk else None, name)
    return Classifier(
        network,
        mean=settings.get("image_mean") or [0.0],
        std=settings.get("image_std") or [1.0],
        # The crop is what the network sees; without one, the resized image is.
        input_size=_height_width(
            (settings.get("do_center_crop", True) and settings.get("crop_size"))
            or settings.get("size")
            or getattr(config, "image_size", None)
            or 224
        ),
        name=name.rstrip("/").split("/")[-1],
    )


def from_timm(name: str) -> Classifier:
    """Load a pretrained timm network with the normalization of its training."""
    timm = _import("timm", "timm:" + name)
    try:
        network: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as error:
        raise ValueError(f"timm:{name} cannot be loaded ({first_line(error)[:200]})") from error
    config = timm.data.resolve_model_data_config(network)
    size = config["input_size"][1:]
    return Classifier(network, mean=config["mean"], std=config["std"], input_size=size, name=name)


def from_torchvision(name: str) -> Classifier:
    """Load a torchvision network with its default weights and their normalization."""
    torchvision = _import("torchvision", "torchvision:" + name)
    try:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        network = torchvision.models.get_model(name, weights=weights)
    except Exception as error:
        raise ValueError(f"torchvision:{name} cannot be loaded ({first_line(error)[:200]})") from error
    transforms = weights.transforms()
    # A list of one side, because the crop is square.
    size = transforms.crop_size[0]
    names = weights.meta["categories"]
    return Classifier(
        network,
        mean=transforms.mean,
        std=transforms.std,
        input_size=(size, size),
        class_names=names,
        name=name,
    )


HUBS: dict[str, Callable[[str], Classifier]] = {
    "hf": from_transformers,
    "timm": from_timm,
    "torchvision": from_torchvision,
}


def _import(package: str, spec: str) -> Any:
    """Import a package; a ValueError says how to install it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        missing = error.name or package
        raise ValueError(f"model {spec} needs {missing}: pip install 'weakspot[{package}]'") from None
    except (ImportError, RuntimeError, OSError) as error:
        raise ValueError(
            f"model {spec} needs {package}, which is installed but cannot be imported ({first_line(error)[:200]})"
        ) from None


def _preprocessing(folder: Path | None, name: str) -> dict[str, Any]:
    """The content of preprocessor_config.json; warns if it does not give the normalization."""
    try:
        if folder is None:
            from transformers.utils import cached_file

            folder = Path(str(cached_file(name, "preprocessor_config.json"))).parent
        settings = dict(json.loads((folder / "preprocessor_config.json").read_text("utf-8")))
        if settings.get("do_normalize") is False:
            return settings | {"image_mean": None, "image_std": None}
        if settings.get("image_mean") and settings.get("image_std"):
            return settings
    except (OSError, ValueError, TypeError, RecursionError):
        settings = {}
    warn(
        f"hf:{name} has no preprocessor_config.json with a normalization, so images are not normalized (give mean and "
        "std)",
        ModelWarning,
    )
    return settings


def _height_width(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        side = size.get("shortest_edge", 224)
        return int(size.get("height") or side), int(size.get("width") or side)
    if isinstance(size, list | tuple):
        return int(size[0]), int(size[1])
    return int(size), int(size)
