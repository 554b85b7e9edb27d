"""Exported models: torch.export archives (.pt2), read only when nothing in them could run code.

torch.export.load falls back to full unpickling for weights, constants and sample inputs, and evaluates symbolic
expressions and guards from the archive. A file from a stranger is therefore inspected first: every pickle in it must
load as plain tensors, every expression be arithmetic, every operator be torch's own.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

OPERATORS = re.compile(
    r"(torch\.ops\.(aten|prims|torchvision|quantized_decomposed)\.|_operator\.|math\.|torch\.sym_)[\w.]+"
)
EXPRESSIONS = (
    ast.Expression, ast.Expr, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.Constant, ast.Name,
    ast.Attribute, ast.Subscript, ast.keyword, ast.Tuple, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.Load,
)  # fmt: skip
FUNCTIONS = re.compile(
    r"Symbol|Integer|Rational|Float|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|Max|Min|Add|Mul|Pow|Eq|Ne|Lt|Le|Gt|Ge|"
    r"StrictLessThan|LessThan|GreaterThan|StrictGreaterThan|Equality|Unequality|And|Or|Not|Piecewise|"
    r"ExprCondPair|Where|Identity|floor|ceiling|Abs|size|stride|storage_offset"
)


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
        with zipfile.ZipFile(path) as archive:
            _refuse_code(archive, path)
    except (zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError, NotImplementedError, RuntimeError):
        raise ValueError(f"{path} is damaged or no archive of torch.export.save") from None
    try:
        program = torch.export.load(path)
    except Exception as error:  # noqa: BLE001 - schema, version and zip errors alike
        raise ValueError(f"{path} cannot be read by torch {torch.__version__}: {error}") from None
    inputs = set(program.graph_signature.user_inputs)
    places = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
    if len(places) != 1:
        raise ValueError(f"{path} takes {len(places)} inputs; accepted is a network of one, the images")
    batch = places[0].meta["val"].shape[0]
    network = program.module()
    return ExportedNetwork(network, batch) if isinstance(batch, int) else network


class ExportedNetwork(nn.Module):
    """A network exported for one batch size, for batches of any."""

    def __init__(self, network: nn.Module, batch: int) -> None:
        super().__init__()
        self.network = network
        self.batch = batch

    def forward(self, images: Tensor) -> Any:
        outputs = []
        for part in images.split(self.batch):
            missing = self.batch - len(part)
            filled = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part
            outputs.append(_first(self.network(filled))[: len(part)])
        return torch.cat(outputs)


def _first(output: Any) -> Tensor:
    from weakspot.classifier import logits_of

    return logits_of(output)


def _refuse_code(archive: zipfile.ZipFile, path: Path) -> None:
    names = archive.namelist()
    if len(set(names)) < len(names):
        raise ValueError(
            f"{path} holds two entries of one name, of which only one can be inspected; it is refused"
        )
    for name in names:
        if "aotinductor" in name or name.endswith((".so", ".dll", ".dylib", ".pyd")):
            raise ValueError(
                f"{path} holds compiled code ({name}), which is refused; save it with torch.export.save"
            )
        if "custom_obj" in name or "opaque_obj" in name:
            raise ValueError(
                f"{path} holds a pickled object ({name}), which is refused because it can run code"
            )
        if name.endswith(".pt"):
            _refuse_pickle(archive.read(name), name, path)
        if name.endswith(".json"):
            content = json.loads(archive.read(name))
            for key, value in _leaves(content):
                _refuse_entry(key, value, name, path)


def _refuse_pickle(content: bytes, name: str, path: Path) -> None:
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # noqa: BLE001 - whatever is not plain tensors
        raise ValueError(f"{path} holds a pickle that is more than tensors ({name}); it is refused") from None


def _refuse_entry(key: str, value: Any, name: str, path: Path) -> None:
    if key == "use_pickle" and value:
        raise ValueError(
            f"{path} keeps tensors as pickles ({name}), which is refused because they can run code"
        )
    if key == "target" and isinstance(value, str) and not OPERATORS.fullmatch(value):
        raise ValueError(f"{path} calls {value!r}, which is none of torch's own operators; it is refused")
    if key in {"expr_str", "guards_code"} and isinstance(value, str) and not _is_arithmetic(value):
        raise ValueError(
            f"{path} holds an expression that is more than arithmetic ({value[:60]!r}); it is refused"
        )


def _leaves(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every scalar in nested JSON, with the key it stands under."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _leaves(value, name)
    elif isinstance(content, list):
        for value in content:
            yield from _leaves(value, key)
    else:
        yield key, content


def _is_arithmetic(expression: str) -> bool:
    try:
        nodes = list(ast.walk(ast.parse(expression, mode="eval")))
    except (SyntaxError, ValueError, RecursionError):
        return False
    if not all(isinstance(node, EXPRESSIONS) for node in nodes):
        return False
    names = [
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in nodes
        if isinstance(node, ast.Attribute | ast.Name)
    ]
    called = [node.func for node in nodes if isinstance(node, ast.Call)]
    functions = [
        node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "?") for node in called
    ]
    return all(FUNCTIONS.fullmatch(function) for function in functions) and not any(
        "__" in name for name in names
    )
