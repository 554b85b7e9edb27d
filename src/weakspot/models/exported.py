"""Archives of torch.export (.pt2), loaded only if nothing in them can run code.

torch.export.load falls back to full unpickling for weights, constants and sample inputs, and evaluates symbolic
expressions, names and guards of the archive. Archives are therefore inspected first: every pickle must load as plain
tensors, every expression must be arithmetic, every name an identifier, and every operator one of torch's own.
"""

import ast
import io
import json
import logging
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from weakspot._errors import first_line
from weakspot.logits import filled, logits_of

OPERATORS = re.compile(
    r"torch\.ops\.(aten|prims|torchvision|quantized_decomposed)\.(?!from_file\b)\w+\.\w+|"
    r"(_operator|math)\.\w+|torch\.sym_\w+"
)
# What torch.export.save writes, now and in the format of torch 2.7.
ENTRIES = re.compile(
    r"([^/]+/)?(archive_format|archive_version|byteorder|version|\.data/\w+|\.\w+|models/model\.json|"
    r"data/weights/(model_weights_config\.json|model\.pt|weight_\d+)|"
    r"data/constants/(model_constants_config\.json|model\.pt|tensor_\d+)|data/sample_inputs/model\.pt|"
    r"serialized_(exported_program\.json|(state_dict|constants|example_inputs)\.pt))"
)
LARGEST = 16 * 2**30  # bytes of all entries of an archive together, more than any image classifier has
RATIO = 100  # uncompressed by compressed size; torch.export.save does not compress, and weights hardly shrink
SMALL = 2**20  # bytes below which an entry may have any ratio: JSON of repetitive networks shrinks a lot
EXTRA = re.compile(r"([^/]+/)?(extra|extra_files)/")
NAMES = {"name", "as_name", "forward_arg_names"}  # torch prints these into Python code that it runs
PATHS = {"fqn", "parameter_name", "buffer_name", "tensor_constant_name", "custom_obj_name"}
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
    """Load the network in a .pt2 archive of `torch.export.save`.

    A network exported for one batch size gets batches of that size; the last batch is padded.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such an archive, or holds anything that can run code.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        inspected = _inspected_archive(path)
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        struct.error,
        json.JSONDecodeError,
        RecursionError,
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
    # An int if the batch size is fixed; a symbol, which is no int, if it is dynamic.
    batch = placeholders[0].meta["val"].shape[0]
    return ExportedNetwork(network, batch) if isinstance(batch, int) else network


class ExportedNetwork(nn.Module):
    """A network exported for one batch size, usable with batches of any size."""

    def __init__(self, network: nn.Module, batch: int) -> None:
        super().__init__()
        self.network = network
        self.fixed_batch = batch

    def forward(self, images: Tensor) -> Tensor:
        parts = images.split(self.fixed_batch)
        return torch.cat(
            [logits_of(self.network(filled(part, self.fixed_batch)))[: len(part)] for part in parts]
        )


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


def _inspected_archive(path: Path) -> io.BytesIO:
    """Inspect an archive and copy its inspected entries to a new one, so that torch reads only those.

    Python's and torch's zip readers can disagree about the content of a crafted file, and torch does not verify
    checksums.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(buffer, "w") as copy:
        _refuse_bomb(archive, path)
        _refuse_code(archive, path)
        for name in archive.namelist():
            if not EXTRA.match(name):
                copy.writestr(name, archive.read(name))
    buffer.seek(0)
    return buffer


def _refuse_code(archive: zipfile.ZipFile, path: Path) -> None:
    names = archive.namelist()
    if len(set(names)) < len(names):
        raise ValueError(
            f"{path} is refused: it holds two entries of one name, of which only one can be inspected"
        )
    for name in names:
        if "aotinductor" in name or name.endswith((".so", ".dll", ".dylib", ".pyd")):
            raise ValueError(
                f"{path} is refused: it holds compiled code ({name}) (save it with torch.export.save)"
            )
        if "custom_obj" in name or "opaque_obj" in name:
            raise ValueError(f"{path} is refused: it holds a pickled object ({name}), which can run code")
        if EXTRA.match(name):
            continue
        if not ENTRIES.fullmatch(name):
            raise ValueError(f"{path} is refused: it holds {name}, which torch.export.save does not write")
        if name.endswith(".pt"):
            _refuse_pickle(archive.read(name), name, path)
        if name.endswith(".json"):
            content = json.loads(archive.read(name))
            for key, value in _leaves(content):
                _refuse_entry(key, value, name, path, names)


def _refuse_bomb(archive: zipfile.ZipFile, path: Path) -> None:
    """Refuse entries that are far larger than the file, before any of them is read."""
    entries = archive.infolist()
    for entry in entries:
        if entry.file_size > SMALL and entry.file_size > RATIO * entry.compress_size:
            raise ValueError(
                f"{path} is refused: {entry.filename} would grow from {entry.compress_size:,} to {entry.file_size:,} "
                "bytes (save it with torch.export.save, which does not compress)"
            )
    total = sum(entry.file_size for entry in entries)
    if total > LARGEST:
        raise ValueError(f"{path} is refused: it holds {total:,} bytes, more than {LARGEST:,}")


def _refuse_pickle(content: bytes, name: str, path: Path) -> None:
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # noqa: BLE001 - torch raises many kinds of errors
        raise ValueError(f"{path} is refused: it holds a pickle of more than tensors ({name})") from None


def _refuse_entry(key: str, value: object, name: str, path: Path, names: list[str]) -> None:
    if key == "use_pickle" and value:
        raise ValueError(f"{path} is refused: it holds tensors as pickles ({name}), which can run code")
    if key == "path_name" and not any(entry.endswith(f"/{value}") for entry in names):
        raise ValueError(f"{path} is damaged: it lacks {value}")
    if key in NAMES and isinstance(value, str) and value and not value.isidentifier():
        raise ValueError(f"{path} is refused: it has a name that is not an identifier ({value[:60]!r})")
    if key in PATHS and isinstance(value, str) and not re.fullmatch(r"[\w.]*", value):
        raise ValueError(f"{path} is refused: it has a name that is not an identifier ({value[:60]!r})")
    if key in {"in_spec", "out_spec"} and isinstance(value, str) and not _is_plain(json.loads(value)):
        raise ValueError(
            f"{path} is refused: it takes or returns more than tuples, lists and mappings of tensors"
        )
    if key in {"target", "as_operator"} and isinstance(value, str) and not OPERATORS.fullmatch(value):
        raise ValueError(f"{path} is refused: it calls {value!r}, which is not one of torch's own operators")
    if key in {"expr_str", "guards_code"} and isinstance(value, str) and not _is_arithmetic(value):
        raise ValueError(
            f"{path} is refused: it holds an expression of more than arithmetic ({value[:60]!r})"
        )


def _leaves(content: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Every scalar in nested JSON, with its key."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _leaves(value, name)
    elif isinstance(content, list):
        for value in content:
            yield from _leaves(value, key)
    else:
        yield key, content


def _is_plain(spec: object) -> bool:
    """Whether a serialized tree holds only containers and names: a context can make torch import any module."""
    if isinstance(spec, list):
        return all(_is_plain(part) for part in spec if not isinstance(part, int))
    if not isinstance(spec, dict):
        return False
    context = spec["context"]
    keys = json.loads(context) if isinstance(context, str) else context
    plain = keys is None or (
        isinstance(keys, list) and all(isinstance(key, str) and key.isidentifier() for key in keys)
    )
    return plain and all(_is_plain(child) for child in spec["children_spec"])


def _is_arithmetic(expression: str) -> bool:
    try:
        nodes = list(ast.walk(ast.parse(expression, mode="eval")))
    except (SyntaxError, ValueError, RecursionError):
        return False
    if not all(isinstance(node, EXPRESSIONS) for node in nodes):
        return False
    # sympy evaluates strings in arguments of its functions, and torch prints the strings of guards into code.
    if any(
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and not re.fullmatch(r"\w+", node.value)
        for node in nodes
    ):
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
    # Names with two underscores, such as __class__, lead from any value to code.
    return all(FUNCTIONS.fullmatch(function) for function in functions) and not any(
        "__" in name for name in names
    )
