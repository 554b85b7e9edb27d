"""Hubs: networks of Hugging Face transformers, timm and torchvision, where those are installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from weakspot._checks import ModelWarning, warn
from weakspot.classifier import Classifier


def from_transformers(name: str) -> Classifier:
    """An image classifier that `save_pretrained` wrote to a directory (safetensors), or of that id on the hub."""
    transformers = _import("transformers", "hf:" + name)
    from_disk = Path(name).is_dir()
    if not from_disk and (name.startswith((".", "/", "~")) or not name):
        raise FileNotFoundError(f"hf:{name}: there is no such directory")
    try:
        network, report = transformers.AutoModelForImageClassification.from_pretrained(
            name,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=from_disk,
            output_loading_info=True,
        )
    except Exception as error:
        raise ValueError(f"hf:{name} cannot be loaded as an image classifier: {_sentence(error)}") from error
    if report["missing_keys"]:
        raise ValueError(
            f"hf:{name} lacks weights that the network needs, {min(report['missing_keys'])} for one"
        )
    config = network.config
    how = _preprocessing(Path(name) if from_disk else None, name)
    names = [str(config.id2label[index]) for index in sorted(config.id2label)]
    known = not all(label == f"LABEL_{index}" for index, label in enumerate(names))
    return Classifier(
        network,
        mean=how.get("image_mean") or [0.0],
        std=how.get("image_std") or [1.0],
        input_size=_both(
            (how.get("do_center_crop", True) and how.get("crop_size"))
            or how.get("size")
            or getattr(config, "image_size", None)
            or 224
        ),
        class_names=names if known else None,
        name=name.rstrip("/").split("/")[-1],
    )


def from_timm(name: str) -> Classifier:
    """A pretrained timm network with the normalization it was trained with."""
    timm = _import("timm", "timm:" + name)
    try:
        network: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as error:
        raise ValueError(f"timm:{name} cannot be loaded: {_sentence(error)}") from error
    how = timm.data.resolve_model_data_config(network)
    return Classifier(network, mean=how["mean"], std=how["std"], input_size=how["input_size"][1:], name=name)


def from_torchvision(name: str) -> Classifier:
    """A pretrained torchvision network with its default weights and their normalization."""
    torchvision = _import("torchvision", "torchvision:" + name)
    try:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        network = torchvision.models.get_model(name, weights=weights)
    except Exception as error:
        raise ValueError(f"torchvision:{name} cannot be loaded: {_sentence(error)}") from error
    how = weights.transforms()
    size = how.crop_size[0]
    names = weights.meta["categories"]
    return Classifier(
        network, mean=how.mean, std=how.std, input_size=(size, size), class_names=names, name=name
    )


HUBS: dict[str, Callable[[str], Classifier]] = {
    "hf": from_transformers,
    "timm": from_timm,
    "torchvision": from_torchvision,
}


def _import(package: str, spec: str) -> Any:
    """The package, or one sentence on why it cannot be had here."""
    import importlib

    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        missing = error.name or package
        raise ValueError(
            f"model {spec} needs {missing}, which is not installed; run: pip install 'weakspot[{package}]'"
        ) from None
    except (ImportError, RuntimeError, OSError) as error:
        raise ValueError(
            f"model {spec} needs {package}, which is installed but does not import with this torch: {_sentence(error)}"
        ) from None


def _sentence(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _preprocessing(folder: Path | None, name: str) -> dict[str, Any]:
    """What preprocessor_config.json says; warned about where there is none."""
    try:
        if folder is None:
            from transformers.utils import cached_file

            folder = Path(str(cached_file(name, "preprocessor_config.json"))).parent
        how = dict(json.loads((folder / "preprocessor_config.json").read_text("utf-8")))
        if how.get("do_normalize") is False:
            return how | {"image_mean": None, "image_std": None}
        if how.get("image_mean") and how.get("image_std"):
            return how
    except (OSError, ValueError, TypeError):
        how = {}
    warn(
        f"hf:{name} has no preprocessor_config.json that says how images are normalized; they are not (give "
        "mean and std)",
        ModelWarning,
    )
    return how


def _both(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        side = size.get("shortest_edge", 224)
        return int(size.get("height") or side), int(size.get("width") or side)
    if isinstance(size, list | tuple):
        return int(size[0]), int(size[1])
    return int(size), int(size)
