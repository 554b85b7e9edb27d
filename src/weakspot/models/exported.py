"""Archives of torch.export (.pt2), loaded only if nothing in them can run code."""

from __future__ import annotations

import json
import logging
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from weakspot._checks import first_line
from weakspot.logits import logits_of
from weakspot.models.inspection import inspected_archive


def load_exported(path: Path) -> nn.Module:
    """Load the network in a .pt2 archive of `torch.export.save`.

    A network exported for one batch size gets batches of that size; the last batch is padded.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such an archive, or holds anything that can run code.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
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
        raise ValueError(f"{path} cannot be read as an archive of torch.export.save") from None
    try:
        with _quiet("torch.export"):
            program = torch.export.load(inspected)
        network = program.module()
    except Exception as error:  # noqa: BLE001 - schema, version and zip errors alike
        raise ValueError(
            f"{path} cannot be read by torch {torch.__version__} ({first_line(error)})"
        ) from None
    inputs = set(program.graph_signature.user_inputs)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
    if len(placeholders) != 1:
        raise ValueError(f"{path} must be a network of one input, the images, got {len(placeholders)} inputs")
    batch = placeholders[0].meta["val"].shape[0]
    return ExportedNetwork(network, batch) if isinstance(batch, int) else network


class ExportedNetwork(nn.Module):
    """A network exported for one batch size, usable with batches of any size."""

    def __init__(self, network: nn.Module, batch: int) -> None:
        super().__init__()
        self.network = network
        self.fixed_batch = batch

    def forward(self, images: Tensor) -> Tensor:
        outputs = []
        for part in images.split(self.fixed_batch):
            missing = self.fixed_batch - len(part)
            filled = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part
            outputs.append(logits_of(self.network(filled))[: len(part)])
        return torch.cat(outputs)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silence a logger: torch logs a traceback for errors that are one sentence here."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
