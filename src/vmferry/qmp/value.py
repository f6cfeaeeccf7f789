"""Frozen values for the files that the command line imports before it can ask anything.

`dataclasses` would say the same, but its import (it needs `inspect`) and the functions that it compiles for each
class are a third of a command's start, 25 of 70 ms.
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn, dataclass_transform


@dataclass_transform(frozen_default=True)
class Value:
    """A base for classes of annotated fields: compared by type and fields, not to be changed. As in a dataclass,
    fields come by place or by name, and one that has a default may be left out."""

    _fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        cls._fields = tuple(cls.__annotations__)
        type.__setattr__(cls, "__match_args__", cls._fields)  # by assignment mypy refuses: it makes its own

    def __init__(self, *values: Any, **named: Any) -> None:
        if len(values) > len(self._fields):
            raise TypeError(f"{type(self).__name__} has {len(self._fields)} fields and was given {len(values)}")
        given = dict(zip(self._fields, values, strict=False))
        wrong = [name for name in named if name in given or name not in self._fields]
        wrong += [name for name in self._fields if name not in given | named and not hasattr(type(self), name)]
        if wrong:
            raise TypeError(f"{type(self).__name__}: unknown, missing or given twice: {', '.join(wrong)}")
        self.__dict__.update(given, **named)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is frozen")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is frozen")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        words = (f"{name}={value!r}" for name, value in zip(self._fields, self._values(), strict=True))
        return f"{type(self).__name__}({', '.join(words)})"

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self._fields)
