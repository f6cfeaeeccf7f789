"""`query-qmp-schema`: what the control socket understands and says, in QEMU's own form, made from the very dataclasses
that decode commands. Pure.

Theory of operation
-------------------
QEMU's introspection is a flat list of named entities: commands, events, objects, arrays, enums and builtin types.
Names of types mean nothing (QEMU masks them with numbers, and so does this), and a member with `default: null` may be
left out. A mapping with free keys has no form there; it is `any`.

Rule 1: a type that this file cannot express is a mistake of ours and raises at once: the tests walk every command.

Source: qapi/introspect.json and docs/devel/qapi-code-gen.rst of QEMU.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

BUILTINS: dict[type, tuple[str, str]] = {
    str: ("str", "string"),
    int: ("int", "int"),
    float: ("number", "number"),
    bool: ("bool", "boolean"),
}
"""Python's type -> QAPI's name and its JSON type."""
ANY = "any"


class Schema:
    """Collects entities; each type once."""

    def __init__(self) -> None:
        self._entities: dict[str, dict[str, Any]] = {}
        self._named: dict[object, str] = {}
        self._dashes = False

    def command(self, name: str, arguments: type, returns: object) -> None:
        """One command: what it takes and what it gives; names of members have dashes, as QEMU's."""
        self._dashes = True
        entity = {"name": name, "meta-type": "command", "arg-type": self._name(arguments)}
        self._entities[name] = {**entity, "ret-type": self._name(returns), "allow-oob": True}

    def event(self, name: str, data: type) -> None:
        """One event; names of members are as they are sent."""
        self._dashes = False
        self._entities[name] = {"name": name, "meta-type": "event", "arg-type": self._name(data)}

    def wire(self) -> list[dict[str, Any]]:
        """The whole list, sorted by name."""
        return [self._entities[name] for name in sorted(self._entities)]

    def _add(self, key: object, entity: dict[str, Any]) -> str:
        """Numbers a new type; its members may refer to it already."""
        name = self._named.setdefault(key, str(len(self._named)))
        self._entities[name] = {"name": name, **entity}
        return name

    def _builtin(self, name: str, json_type: str) -> str:
        self._entities[name] = {"name": name, "meta-type": "builtin", "json-type": json_type}
        return name

    def _name(self, kind: Any) -> str:
        """The name of a type, which is described if it was not yet."""
        if kind in BUILTINS:
            return self._builtin(*BUILTINS[kind])
        origin, inner = get_origin(kind), get_args(kind)
        if kind is Any or origin in (dict, Mapping):
            return self._builtin(ANY, "value")
        if kind in self._named:
            return self._named[kind]
        if origin in (list, tuple):
            element = self._name(inner[0])
            name = f"[{element}]"
            self._entities[name] = {"name": name, "meta-type": "array", "element-type": element}
            return name
        if origin is Literal:
            return self._enum(kind, [str(word) for word in inner])
        if isinstance(kind, type) and issubclass(kind, Enum):
            return self._enum(kind, [str(member.value) for member in kind])
        if dataclasses.is_dataclass(kind):
            return self._object(kind)
        raise TypeError(f"{kind!r} has no form in a QMP schema")

    def _enum(self, key: object, words: list[str]) -> str:
        return self._add(key, {"meta-type": "enum", "values": words, "members": [{"name": word} for word in words]})

    def _object(self, kind: Any) -> str:
        self._named[kind] = str(len(self._named))
        hints = get_type_hints(kind)
        members = [self._member(field, hints[field.name]) for field in dataclasses.fields(kind)]
        return self._add(kind, {"meta-type": "object", "members": members})

    def _member(self, field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
        name = field.name.replace("_", "-") if self._dashes else field.name
        told = {"name": name, "type": self._name(_without_none(hint))}
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        return {**told, "default": None} if has_default else told


def _without_none(hint: Any) -> Any:
    """`int | None` -> int: what may be None may be left out."""
    if get_origin(hint) in (Union, types.UnionType):
        rest = [part for part in get_args(hint) if part is not type(None)]
        if len(rest) == 1:
            return rest[0]
    return hint
