"""QEMU's option text, `a,key=value,flag`, read and written by QEMU's own comma rule.

Theory of operation
-------------------
A value ends at a comma that is not doubled; `,,` inside a value means one comma. The first element may
leave its key out when the option has an implied key (`-machine q35` is `type=q35`). A later element
without `=` is a flag. Keys may repeat and order counts, so an option is a tuple of pairs and not a dict.
Some options also take a JSON object; that form is told by its first character.

Rule 1: `parse(render(pairs))` gives the same pairs, for every pairs that `render` accepts.
Rule 2: nothing is normalised: `on` stays `on`, a flag stays a flag; QEMU reads back what was written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

Pair = tuple[str, str | None]
Pairs = tuple[Pair, ...]


def parse(text: str, *, implied: str | None = None) -> Pairs:
    """Option text -> (key, value) pairs; a flag has the value None. Raises ValueError for an empty key."""
    pairs: list[Pair] = []
    position = 0
    while position < len(text):
        stop = _first_of(text, position, "=,")
        if stop < len(text) and text[stop] == "=":
            key = text[position:stop]
            value, position = _value(text, stop + 1)
            pairs.append((key, value))
        elif not pairs and implied is not None:
            value, position = _value(text, position)
            pairs.append((implied, value))
        else:
            pairs.append((text[position:stop], None))
            position = stop + 1
        if not pairs[-1][0]:
            raise ValueError(f"an option has an empty name in {text!r}")
    return tuple(pairs)


def render(pairs: Iterable[Pair], *, implied: str | None = None) -> str:
    """The text that `parse` reads as `pairs`. Raises ValueError for a key that no text can express."""
    parts: list[str] = []
    for index, (key, value) in enumerate(pairs):
        if not key or "=" in key or "," in key:
            raise ValueError(f"{key!r} cannot be the name of a QEMU option")
        if value is None:
            if index == 0 and implied is not None:
                raise ValueError(f"the flag {key!r} cannot come first where {implied!r} is implied")
            parts.append(key)
            continue
        escaped = value.replace(",", ",,")
        bare = index == 0 and key == implied and value and "=" not in value.split(",", 1)[0]
        parts.append(escaped if bare else f"{key}={escaped}")
    return ",".join(parts)


def get(pairs: Pairs, key: str) -> str | None:
    """The last value of `key`, as QEMU takes it; a flag counts as 'on'; None when it is absent."""
    found: str | None = None
    for name, value in pairs:
        if name == key:
            found = "on" if value is None else value
        elif value is None and name == f"no{key}":
            found = "off"
    return found


def put(pairs: Pairs, key: str, value: str) -> Pairs:
    """`pairs` with `key` set once: in its old place if it was there, else at the end."""
    result: list[Pair] = []
    done = False
    for name, old in pairs:
        if name != key and not (old is None and name == f"no{key}"):
            result.append((name, old))
        elif not done:
            result.append((key, value))
            done = True
    return tuple(result if done else [*result, (key, value)])


def drop(pairs: Pairs, *keys: str) -> Pairs:
    """`pairs` without `keys`, in either spelling of a flag (`wait`, `nowait`)."""
    return tuple(
        (name, value)
        for name, value in pairs
        if name not in keys and not (value is None and name.removeprefix("no") in keys)
    )


def is_on(value: str | None) -> bool:
    """Whether QEMU reads this value as true; an absent one is false."""
    return value in {"on", "yes", "true", "y"}


def is_json(text: str) -> bool:
    """Whether QEMU reads the option as a JSON object and not by the comma rule."""
    return text.startswith("{")


def parse_json(text: str) -> dict[str, Any]:
    """The JSON form of an option. Raises ValueError when it is not an object."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{text!r} is not a JSON object")
    return value


def render_json(value: dict[str, Any]) -> str:
    """The JSON form of an option, without spaces, keys in the order given."""
    return json.dumps(value, separators=(",", ":"))


def _first_of(text: str, start: int, characters: str) -> int:
    """The index of the first of `characters` at or after `start`, or the length of the text."""
    return min((found for char in characters if (found := text.find(char, start)) >= 0), default=len(text))


def _value(text: str, start: int) -> tuple[str, int]:
    """The unescaped value that begins at `start`, and where the next element begins."""
    parts: list[str] = []
    while True:
        comma = text.find(",", start)
        if comma < 0:
            parts.append(text[start:])
            return "".join(parts), len(text)
        if text[comma : comma + 2] != ",,":
            parts.append(text[start:comma])
            return "".join(parts), comma + 1
        parts.append(text[start : comma + 1])
        start = comma + 2
