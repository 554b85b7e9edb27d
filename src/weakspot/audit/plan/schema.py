"""Typed values from the plain ones of TOML and JSON: dataclasses are the schema, every wrong type is one sentence."""

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import TypeVar, Union, get_args, get_origin, get_type_hints

from weakspot._checks import unknown_choice

T = TypeVar("T")
SCALARS: dict[object, tuple[str, tuple[type, ...]]] = {
    str: ("a text", (str,)),
    bool: ("true or false", (bool,)),
    int: ("an integer", (int,)),
    float: ("a number", (int, float)),
    type(None): ("null", (type(None),)),
}


@dataclass(frozen=True)
class Reader:
    """Reads values by their types.

    Attributes:
        spelled: whether values are as people write them: texts separated by commas stand for lists, a text stands for
            a table by its first key, and an unknown key is an error. Otherwise, unknown keys are of a newer version.
        own: type -> function that reads its values.
    """

    spelled: bool = False
    own: Mapping[object, Callable[[object], object]] = field(default_factory=dict)

    def table(self, kind: type[T], value: object, name: str, more: Iterable[str] = ()) -> T:
        """A dataclass from a table.

        Args:
            kind: the dataclass.
            value: the table.
            name: of the table, in messages.
            more: further keys that the message on an unknown key names.

        Raises:
            ValueError: if the value is no table, lacks a key or has another, or one of its values has another type.
        """
        entries = {entry.name: entry for entry in fields(kind)}  # type: ignore[arg-type]  # a dataclass
        keys = sorted({*entries, *more})
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} must be a table of {', '.join(keys)}, got {value!r}")
        hints, values = get_type_hints(kind), {}
        for key, item in value.items():
            if key in entries:
                # Messages name the keys of a plan as its file spells them, without the plan in front.
                values[key] = self.read(hints[key], item, f"{name}.{key}".removeprefix("plan."))
            elif self.spelled:
                raise ValueError(unknown_choice(f"key of {name}", str(key), keys))
        for key, entry in entries.items():
            if key not in values and entry.default is MISSING and entry.default_factory is MISSING:
                raise ValueError(
                    f"{name} must have the key {key}, got {', '.join(map(str, value)) or 'none'}"
                )
        return kind(**values)

    def read(self, hint: object, value: object, name: str) -> object:
        """A value of a type: a scalar, a tuple, a mapping, a dataclass, or a union of them.

        Raises:
            ValueError: if it has another type.
        """
        if hint in self.own:
            return self._by_own(hint, value, name)
        kinds = get_args(hint) if _is_union(hint) else (hint,)
        # The first kind whose outer form fits decides, and errors inside the value are errors of that kind.
        kind = next((kind for kind in kinds if self._fits(kind, value)), None)
        if kind is None:
            expected = [_expected(kind) for kind in kinds if kind is not type(None) or len(kinds) == 1]
            raise ValueError(f"{name} must be {' or '.join(expected)}, got {value!r}")
        if isinstance(kind, type) and is_dataclass(kind):
            first = fields(kind)[0].name
            return self.table(kind, {first: value.strip()} if isinstance(value, str) else value, name)
        if get_origin(kind) is tuple:
            return self._tuple(get_args(kind), value, name)
        if isinstance(value, Mapping):
            _, inner = get_args(kind)
            return {str(key): self.read(inner, item, f"{name}.{key}") for key, item in value.items()}
        return float(value) if kind is float else value  # type: ignore[arg-type]  # it fits

    def _tuple(self, inner: tuple[object, ...], value: object, name: str) -> tuple[object, ...]:
        if isinstance(value, Mapping):  # pairs of names and values
            _, kind = get_args(inner[0])
            # Sorted, so that the order of keys in a file makes no other plan.
            return tuple((key, self.read(kind, value[key], f"{name}.{key}")) for key in sorted(value))
        items = [part for part in value.split(",") if part.strip()] if isinstance(value, str) else list(value)  # type: ignore[call-overload]  # it fits
        if Ellipsis not in inner and len(items) != len(inner):
            raise ValueError(f"{name} must have {len(inner)} values, got {value!r}")
        kinds = inner if Ellipsis not in inner else (inner[0],) * len(items)
        return tuple(
            self.read(kind, item.strip() if isinstance(item, str) else item, f"{name}[{number}]")
            for number, (kind, item) in enumerate(zip(kinds, items, strict=True))
        )

    def _fits(self, kind: object, value: object) -> bool:
        """Whether a value has the outer form of a type; what is inside is read afterwards."""
        if kind in SCALARS:
            # To Python, true is an integer as well.
            return isinstance(value, SCALARS[kind][1]) and (kind is bool or not isinstance(value, bool))
        if get_origin(kind) is tuple:
            inner = get_args(kind)[0]
            if _is_pair(inner) and isinstance(value, Mapping):
                return True
            splits = self.spelled and (inner is str or is_dataclass(inner))
            return isinstance(value, list | tuple) or (splits and isinstance(value, str))
        return isinstance(value, Mapping) or (self.spelled and is_dataclass(kind) and isinstance(value, str))

    def _by_own(self, hint: object, value: object, name: str) -> object:
        try:
            return self.own[hint](value)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{name} lacks a value or has one of the wrong type ({error!r})") from None


def _is_union(hint: object) -> bool:
    return get_origin(hint) in {Union, types.UnionType}


def _is_pair(hint: object) -> bool:
    return get_origin(hint) is tuple and Ellipsis not in get_args(hint)


def _expected(kind: object) -> str:
    if kind in SCALARS:
        return SCALARS[kind][0]
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        if _is_pair(inner[0]):
            return "a table"
        kinds = {str: "texts", int: "integers", float: "numbers"}
        return f"a list of {kinds.get(inner[0], 'names or tables')}"
    if isinstance(kind, type) and is_dataclass(kind):
        return f"a table of {', '.join(sorted(entry.name for entry in fields(kind)))}"
    return "a table"
