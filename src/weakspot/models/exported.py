"""Exported models: torch.export archives (.pt2), read only when nothing in them could run code."""

from __future__ import annotations

import json
import logging
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weakspot.models.inspection import inspected_archive


def load_exported(path: Path) -> nn.Module:
    """The network in a .pt2 archive that `torch.export.save` wrote.

    A network exported for one batch size is given batches of that size, the last one filled up.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no such archive, or holds anything that could run code.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        inspected = inspected_archive(path)
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        struct.error,
        json.JSONDecodeError,
        UnicodeDecodeError,
        NotImplementedError,
        RuntimeError,
    ):
        raise ValueError(f"{path} is damaged or no archive of torch.export.save") from None
    try:
        with _quiet("torch.export"):
            program = torch.export.load(inspected)
        network = program.module()
    except Exception as error:  # noqa: BLE001 - schema, version and zip errors alike
        why = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} cannot be read by torch {torch.__version__}: {why}") from None
    inputs = set(program.graph_signature.user_inputs)
    places = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
    if len(places) != 1:
        raise ValueError(f"{path} takes {len(places)} inputs; accepted is a network of one, the images")
    batch = places[0].meta["val"].shape[0]
    return ExportedNetwork(network, batch) if isinstance(batch, int) else network


class ExportedNetwork(nn.Module):
    """A network exported for one batch size, for batches of any."""

    def __init__(self, network: nn.Module, batch: int) -> None:
        super().__init__()
        self.network = network
        self.fixed_batch = batch

    def forward(self, images: Tensor) -> Any:
        outputs = []
        for part in images.split(self.fixed_batch):
            missing = self.fixed_batch - len(part)
            filled = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part
            outputs.append(_first(self.network(filled))[: len(part)])
        return torch.cat(outputs)


def _first(output: Any) -> Tensor:
    from weakspot.logits import logits_of

    return logits_of(output)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """torch logs a traceback for what is told in one sentence here."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
