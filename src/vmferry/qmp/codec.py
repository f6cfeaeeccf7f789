"""QMP's bytes and messages, without any I/O: for the client, the server and the simulator alike.

Theory of operation
-------------------
QMP is a *stream* of JSON values: nothing separates them, so neither end may count on lines. `Decoder.feed`
takes bytes as they come, `Decoder.next` gives one message at a time or `NEED_DATA`. The scanner finds where a
value ends by QEMU's own rules (json-lexer.c, json-streamer.c) and remembers where it stopped, so that each
byte is looked at a bounded number of times however the stream is cut. The delimited slice then goes to the
standard library's JSON decoder. Single-quoted strings, which QEMU accepts, are rewritten first.

Resynchronisation after bad input, as QEMU does it:

* A byte that cannot be there (in or outside a string) ends the value being read: one `BadSyntax`, nesting
  forgotten. Bytes are then skipped up to one of `{ } [ ] : ,`, a control character other than tab, or 0xFE or
  0xFF; reading starts anew *at* that byte. So a newline inside a string ends a truncated command, and 0xFF
  gets the decoder out of any state. What remains of the bad value may give further `BadSyntax`.
* A value whose brackets balance but which is no JSON gives one `BadSyntax`; reading goes on after it.

Where we differ from QEMU, each time towards one error instead of several:

* An oversized or too deeply nested value gives one `BadSyntax` at once and is then skipped without being
  kept, up to its end or the next impossible byte. (QEMU starts anew in its middle.)
* What is wrong in grammar only, such as two commas in a row, is noticed at the end of its value and gives one
  `BadSyntax`. (So does QEMU 7.2; QEMU 11 notices at once, and then also skips to the end.)
* `0e1` is JSON and is taken; QEMU 7.2 and 11.1 refuse an exponent after a lone zero.

Rule 1: any bytes give messages, `BadSyntax` or `NEED_DATA`; any other exception is a bug.
Rule 2: what is held never exceeds `max_message_bytes` plus what was fed since `next` last gave `NEED_DATA`.
Rule 3: only the standard library's json: the command line imports this file and must start fast.
"""

from __future__ import annotations

import enum
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from vmferry import limits
from vmferry.qmp.value import Value


class NeedData(enum.Enum):
    """What `Decoder.next` gives when the bytes fed so far hold no further whole message."""

    NEED_DATA = "need-data"


class Missing(enum.Enum):
    """Stands for an absent `id`, because `null` is an id too."""

    MISSING = "missing"


NEED_DATA: Final = NeedData.NEED_DATA
MISSING: Final = Missing.MISSING


class Greeting(Value):
    """The server's first message: its version as it says it, and the capabilities it offers."""

    version: dict[str, Any]
    capabilities: tuple[str, ...]


class Reply(Value):
    """A command succeeded."""

    value: Any
    id: Any = MISSING


class ErrorReply(Value):
    """A command failed. `data` is vmferry's own member: a `VmferryError.to_wire()`."""

    qmp_class: str
    desc: str
    id: Any = MISSING
    data: dict[str, Any] | None = None


class Event(Value):
    """Something happened. `timestamp_us` is the sender's wall clock, or None if it has none."""

    name: str
    data: dict[str, Any]
    timestamp_us: int | None = None


class Command(Value):
    """A request; `oob` says that it came as `exec-oob`."""

    name: str
    arguments: dict[str, Any]
    id: Any = MISSING
    oob: bool = False


class Malformed(Value):
    """Well-formed JSON that is no QMP message; `desc` is worded as QEMU words it."""

    desc: str
    id: Any = MISSING


class BadSyntax(Value):
    """Bytes that are no JSON, or too many of them; the decoder has resynchronised already."""

    desc: str


Message = Greeting | Reply | ErrorReply | Event | Command | Malformed | BadSyntax

_Mode = Literal["between", "keyword", "number", "inside", "string", "recovery"]

# The bytes that end a string before its quote does: control characters and the two impossible in UTF-8.
_END = rb"\x00-\x1f\xfe\xff"
_SPACE = re.compile(rb"[ \t\r\n]*+")
_KEYWORD = re.compile(rb"[a-z]*+")
_NUMBER = re.compile(rb"-?+(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][+-]?+[0-9]++)?+")
# As much of a number as there is: what follows is not part of it, or is what makes it malformed.
_NUMBER_BEGUN = re.compile(
    rb"-?+(?:(?:0|[1-9][0-9]*+)(?:\.(?:[0-9]++(?:[eE][+-]?+[0-9]*+)?+)?+|[eE][+-]?+[0-9]*+)?+)?+"
)
# Anything between two brackets, as long as it is whole: strings and ordinary numbers are passed over at once.
_FLAT = re.compile(
    rb'(?:[ \t\r\n:,]++|[a-z]++|%b(?=[ \t\r\n,\]}])|"(?:[^"\\%b]++|\\[^%b])*+")*+' % (_NUMBER.pattern, _END, _END)
)
_BODY = {
    ord('"'): re.compile(rb'(?:[^"\\%b]++|\\[^%b])*+' % (_END, _END)),
    ord("'"): re.compile(rb"(?:[^'\\%b]++|\\[^%b])*+" % (_END, _END)),
}
_SKIPPED = re.compile(rb"[^\x00-\x08\x0a-\x1f{}\[\]:,\xfe\xff]*+")
_DIGITS = frozenset(b"0123456789")
_NUMBER_STARTS = frozenset(b"-0123456789")
_KEYWORD_STARTS = frozenset(b"abcdefghijklmnopqrstuvwxyz")


class Decoder:
    """Bytes in, messages out; one per direction of a connection.

    `max_message_bytes` and `max_depth` bound one value; what exceeds them becomes one `BadSyntax`.
    """

    def __init__(
        self,
        *,
        max_message_bytes: int = limits.QMP_MESSAGE_BYTES_MAX,
        max_depth: int = limits.QMP_DEPTH_MAX,
    ) -> None:
        assert max_message_bytes > 0
        assert max_depth > 0
        self._max_message_bytes = max_message_bytes
        self._max_depth = max_depth
        self._buffer = bytearray()  # begins with the value being read, unless that is being discarded
        self._position = 0  # the first byte that has not been scanned
        self._mode: _Mode = "between"
        self._quote = 0
        self._braces = 0
        self._brackets = 0
        self._discarding = False

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes; nothing is looked at before `next`."""
        self._buffer += data

    @property
    def held_bytes(self) -> int:
        """How many bytes are kept right now."""
        return len(self._buffer)

    @property
    def is_between(self) -> bool:
        """Whether the stream may end here without cutting a value in two."""
        return self._mode in ("between", "recovery") and not self._buffer.strip(b" \t\r\n")

    def next(self) -> Message | NeedData:
        """The next message, a `BadSyntax` for bad input, or `NEED_DATA`. Never raises."""
        found: Message | NeedData | None = self._usual()
        if found is not None:
            return found
        while self._position < len(self._buffer):
            match self._mode:
                case "between":
                    found = self._on_between()
                case "keyword":
                    found = self._on_keyword()
                case "number":
                    found = self._on_number()
                case "inside":
                    found = self._on_inside()
                case "string":
                    found = self._on_string()
                case _:
                    assert self._mode == "recovery"
                    found = self._on_recovery()
            if found is not None:
                return found
            if self._is_newly_too_long:
                self._discarding = True
                return BadSyntax("JSON token size limit exceeded")
            if self._discarding:
                self._drop_scanned()
        return NEED_DATA

    def _usual(self) -> Message | None:
        """One object in strict JSON, and the end of its line: what QEMU and every tool send, and half the work to take
        as a whole. None for all else, and for what is wrong with it: then it is looked at byte by byte."""
        buffer = self._buffer
        if (
            self._mode != "between"
            or not buffer.endswith(b"\n")
            or len(buffer) > self._max_message_bytes
            or buffer[0] != 0x7B
            or buffer.count(b"\n") != 1
            or buffer.count(b"{") + buffer.count(b"[") > self._max_depth
        ):
            return None
        try:
            message = classify(_strict(buffer.decode("utf-8")))
        except (ValueError, RecursionError):
            return None
        self._position = len(buffer)
        self._reset()
        return message

    @property
    def _is_newly_too_long(self) -> bool:
        """That is told before whatever comes next, so that it does not matter in which pieces the bytes arrive."""
        return self._position > self._max_message_bytes and not self._discarding

    def _on_between(self) -> Message | None:
        self._position = _end_of(_SPACE, self._buffer, 0)
        self._drop_scanned()
        if not self._buffer:
            return None
        byte = self._buffer[0]
        self._position = 1
        match byte:
            case 0x7B | 0x5B:  # { [
                self._mode = "inside"
                self._count(byte)
            case 0x22 | 0x27:  # " '
                self._mode, self._quote = "string", byte
            case 0x7D | 0x5D | 0x3A | 0x2C:  # } ] : ,
                self._reset()
                return BadSyntax("JSON parse error, expecting value")
            case _ if byte in _KEYWORD_STARTS:
                self._mode = "keyword"
            case _ if byte in _NUMBER_STARTS:
                self._mode, self._position = "number", 0
            case _:
                return self._stray()
        return None

    def _on_keyword(self) -> Message | None:
        self._position = _end_of(_KEYWORD, self._buffer, self._position)
        return None if self._position == len(self._buffer) else self._finish()

    def _on_number(self) -> Message | NeedData | None:
        """A number that begins at `_position`, and is looked at from there until it ends."""
        buffer, start = self._buffer, self._position
        end = _end_of(_NUMBER_BEGUN, buffer, start)
        if end == len(buffer) and end - start <= limits.QMP_NUMBER_BYTES_MAX:
            return NEED_DATA
        is_whole = _NUMBER.fullmatch(buffer, start, end) is not None
        if end == len(buffer) or not is_whole or buffer[end] in _DIGITS:  # the last: 01
            self._position = min(end + 1, len(buffer))
            return self._stray()
        self._position = end
        return self._after_token()

    def _on_inside(self) -> Message | None:
        self._position = _end_of(_FLAT, self._buffer, self._position)
        if self._position == len(self._buffer) or self._is_newly_too_long:
            return None
        byte = self._buffer[self._position]
        self._position += 1
        match byte:
            case 0x22 | 0x27:
                self._mode, self._quote = "string", byte
                return None
            case 0x7B | 0x5B | 0x7D | 0x5D:
                self._count(byte)
            case _ if byte in _NUMBER_STARTS:
                self._mode = "number"
                self._position -= 1
                return None
            case _:
                return self._stray()
        if min(self._braces, self._brackets) < 0 or self._braces == self._brackets == 0:
            return self._finish()
        if self._braces + self._brackets > self._max_depth and not self._discarding:
            self._discarding = True
            return BadSyntax("JSON nesting depth limit exceeded")
        return None

    def _on_string(self) -> Message | NeedData | None:
        buffer = self._buffer
        self._position = _end_of(_BODY[self._quote], buffer, self._position)
        if self._position == len(buffer) or self._is_newly_too_long:
            return None
        byte = buffer[self._position]
        if byte == 0x5C:  # a backslash before an impossible byte, or before what is still to come
            if self._position + 1 == len(buffer):
                return NEED_DATA
            self._position += 1
        self._position += 1
        if byte != self._quote:
            return self._stray()
        return self._after_token()

    def _after_token(self) -> Message | None:
        if self._braces == self._brackets == 0:
            return self._finish()
        self._mode = "inside"
        return None

    def _on_recovery(self) -> Message | None:
        self._position = _end_of(_SKIPPED, self._buffer, 0)
        self._drop_scanned()
        if self._buffer:
            self._mode = "between"
        return None

    def _count(self, byte: int) -> None:
        match byte:
            case 0x7B:
                self._braces += 1
            case 0x7D:
                self._braces -= 1
            case 0x5B:
                self._brackets += 1
            case _:
                assert byte == 0x5D
                self._brackets -= 1

    def _finish(self) -> Message | None:
        """The value ends before `_position`: decode it, unless it was discarded (then it is reported)."""
        if self._discarding:
            self._reset()
            return None
        if self._position > self._max_message_bytes:
            self._reset()
            return BadSyntax("JSON token size limit exceeded")
        raw = bytes(self._buffer[: self._position])
        self._reset()
        try:
            return classify(_parse(raw))
        except (ValueError, RecursionError) as error:
            return BadSyntax(f"JSON parse error, {error}")

    def _stray(self) -> BadSyntax:
        """The byte before `_position` cannot be there."""
        byte = self._buffer[self._position - 1]
        self._reset()
        self._mode = "recovery"
        return BadSyntax(f"JSON parse error, stray byte 0x{byte:02x}")

    def _reset(self) -> None:
        self._drop_scanned()
        self._mode = "between"
        self._braces = self._brackets = 0
        self._discarding = False

    def _drop_scanned(self) -> None:
        del self._buffer[: self._position]  # cheap: a bytearray remembers its start
        self._position = 0


def _end_of(pattern: re.Pattern[bytes], buffer: bytearray, position: int) -> int:
    # The match object must not outlive this call: it pins the bytearray.
    match = pattern.match(buffer, position)
    assert match is not None, "these patterns match the empty string too"
    return match.end()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate key")
    return members


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):  # could be read, but not be written back as the `id` of a reply
        raise ValueError("number out of range")
    return number


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number")  # Python would take NaN and Infinity


_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_no_constant)
_QUOTED = re.compile(r""""((?:[^"\\]++|\\.)*+)"|'((?:[^'\\]++|\\.)*+)'""", re.DOTALL)
_ESCAPED = re.compile(r'\\.|"', re.DOTALL)


def _parse(raw: bytes) -> Any:
    """One JSON value, by QEMU's grammar. Raises ValueError or RecursionError."""
    text = raw.decode("utf-8")
    try:
        return _strict(text)
    except ValueError:
        # Strict JSON means the same to QEMU; only text with an apostrophe may mean something to QEMU alone.
        if "'" not in text:
            raise
    return _strict(_QUOTED.sub(_requote, text))


def _strict(text: str) -> Any:
    """One JSON value, by JSON's grammar. Raises ValueError or RecursionError."""
    value = _JSON.decode(text)
    if "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no character
    return value


def _requote(quoted: re.Match[str]) -> str:
    body = quoted[1] if quoted[2] is None else quoted[2]
    return '"' + _ESCAPED.sub(_reescape, body) + '"'


def _reescape(escaped: re.Match[str]) -> str:
    match escaped[0]:
        case "\\'":
            return "'"
        case '"':
            return '\\"'
        case other:
            return other


_COMMAND_MEMBERS = frozenset(("execute", "exec-oob", "arguments", "id"))


def classify(obj: Any) -> Greeting | Reply | ErrorReply | Event | Command | Malformed:
    """Which QMP message a JSON value is; what is none is `Malformed`, worded as QEMU words it."""
    if not isinstance(obj, dict):
        return Malformed("QMP input must be a JSON object")
    message_id = obj.get("id", MISSING)
    match obj:
        case {"return": value}:
            return Reply(value, message_id)
        case {"error": {"class": str(qmp_class), "desc": str(desc), **rest}}:
            data = rest.get("data")
            return ErrorReply(qmp_class, desc, message_id, data if isinstance(data, dict) else None)
        case {"event": str(name)}:
            data = obj.get("data")
            return Event(name, data if isinstance(data, dict) else {}, _timestamp_us(obj.get("timestamp")))
        case {"QMP": {"version": dict(version), "capabilities": list(capabilities)}}:
            return Greeting(version, tuple(str(name) for name in capabilities))
        case _:
            return _classify_command(obj, message_id)


def _timestamp_us(stamp: Any) -> int | None:
    match stamp:
        case {"seconds": int(seconds), "microseconds": int(microseconds)} if seconds >= 0:
            return seconds * 1_000_000 + microseconds
        case _:
            return None


def _classify_command(obj: dict[str, Any], message_id: Any) -> Command | Malformed:
    for member in obj:
        if member not in _COMMAND_MEMBERS:
            return Malformed(f"QMP input member '{member}' is unexpected", message_id)
    if "execute" in obj and "exec-oob" in obj:
        return Malformed("QMP input member 'execute' clashes with 'exec-oob'", message_id)
    verb = "exec-oob" if "exec-oob" in obj else "execute"
    if verb not in obj:
        return Malformed("QMP input lacks member 'execute'", message_id)
    if not isinstance(obj[verb], str):
        return Malformed(f"QMP input member '{verb}' must be a string", message_id)
    arguments = obj.get("arguments", {})
    if not isinstance(arguments, dict):
        return Malformed("QMP input member 'arguments' must be an object", message_id)
    return Command(obj[verb], arguments, message_id, oob=verb == "exec-oob")


_ENCODER = json.JSONEncoder(allow_nan=False)


def encode_object(obj: Mapping[str, Any]) -> bytes:
    """One JSON object on one line ended by CRLF, ASCII only.

    Raises ValueError or TypeError for what JSON cannot say; nothing is sent then.
    """
    return _ENCODER.encode(obj).encode("ascii") + b"\r\n"


def encode_command(
    name: str, arguments: Mapping[str, Any] | None = None, *, id: Any = MISSING, oob: bool = False
) -> bytes:
    """A request; without `arguments` the member is left out."""
    obj: dict[str, Any] = {"exec-oob" if oob else "execute": name}
    if arguments is not None:
        obj["arguments"] = dict(arguments)
    return encode_object(_with_id(obj, id))


def encode_reply(value: Any, *, id: Any = MISSING) -> bytes:
    """The answer to a command that succeeded."""
    return encode_object(_with_id({"return": value}, id))


def encode_error(qmp_class: str, desc: str, *, id: Any = MISSING, data: Mapping[str, Any] | None = None) -> bytes:
    """The answer to a command that failed; `data` becomes the extra member `error.data`."""
    error: dict[str, Any] = {"class": qmp_class, "desc": desc}
    if data is not None:
        error["data"] = dict(data)
    return encode_object(_with_id({"error": error}, id))


def encode_event(name: str, data: Mapping[str, Any] | None = None, *, timestamp_us: int) -> bytes:
    """An event; `timestamp_us` is microseconds since 1970 by the sender's clock."""
    seconds, microseconds = divmod(timestamp_us, 1_000_000)
    obj: dict[str, Any] = {
        "timestamp": {"seconds": seconds, "microseconds": microseconds},
        "event": name,
    }
    if data:
        obj["data"] = dict(data)
    return encode_object(obj)


def encode_greeting(version: Mapping[str, Any], capabilities: Sequence[str] = ()) -> bytes:
    """The server's first line."""
    return encode_object({"QMP": {"version": dict(version), "capabilities": list(capabilities)}})


def _with_id(obj: dict[str, Any], id: Any) -> dict[str, Any]:
    if id is not MISSING:
        obj["id"] = id
    return obj
