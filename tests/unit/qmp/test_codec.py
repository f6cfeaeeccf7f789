"""The QMP codec: every case is decoded whole, byte by byte, and with more behind it."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vmferry import limits
from vmferry.qmp.codec import (
    MISSING,
    NEED_DATA,
    BadSyntax,
    Command,
    Decoder,
    ErrorReply,
    Event,
    Greeting,
    Malformed,
    Message,
    NeedData,
    Reply,
    classify,
    encode_command,
    encode_error,
    encode_event,
    encode_greeting,
    encode_object,
    encode_reply,
)

STRAY = "stray"  # stands for a BadSyntax at a byte that cannot be there
VALUE = "value"  # stands for a BadSyntax at the end of a value


def drain(decoder: Decoder) -> list[Message]:
    messages = []
    while not isinstance(message := decoder.next(), NeedData):
        messages.append(message)
    return messages


def decode(data: bytes, *, step: int = 0, **options: int) -> list[Message]:
    decoder = Decoder(**options)
    messages = []
    step = step or max(1, len(data))
    for at in range(0, len(data), step):
        decoder.feed(data[at : at + step])
        messages += drain(decoder)
    return messages


def short(messages: list[Message]) -> list[Any]:
    """Messages as they are, errors of syntax as STRAY or VALUE."""

    def one(message: Message) -> Any:
        if not isinstance(message, BadSyntax):
            return message
        return STRAY if "stray" in message.desc else VALUE

    return [one(message) for message in messages]


def three_ways(data: bytes, **options: int) -> list[Any]:
    """What `data` decodes to: whole; one byte at a time; with a whole and half a message behind it."""
    whole = decode(data, **options)
    assert decode(data, step=1, **options) == whole
    assert decode(data, step=3, **options) == whole
    behind = b'\n\xff\n{"execute":"behind"}{"execute":"ha'
    longer = decode(data + behind, **options)
    assert longer[: len(whole)] == whole
    assert longer[-1] == Command("behind", {})
    return short(whole)


NOT_AN_OBJECT = Malformed("QMP input must be a JSON object")
STATUS = Command("query-status", {}, 1)

STREAMS: list[tuple[bytes, list[Any]]] = [
    (b"", []),
    (b" \r\n\t ", []),
    # framing
    (b'{"execute":"query-status","id":1}', [STATUS]),
    (b'{"execute":"query-status","id":1}\r\n', [STATUS]),
    (b'{"execute":"query-status","id":1}{"execute":"query-status","id":1}', [STATUS, STATUS]),
    (b'\r\n\t{ "execute" :\n"query-status" ,"id"\t:1 } \n', [STATUS]),
    (b'{"execute":"a","arguments":{"x":[{},[{"y":[]}]]}}', [Command("a", {"x": [{}, [{"y": []}]]})]),
    (b'{"execute":"}{][\\"}{"}', [Command('}{]["}{', {})]),
    (b'{"execute":"\\\\"}', [Command("\\", {})]),
    (b'{"execute":"a\\u00e9\xc3\xa9\\ud83d\\ude00\\n"}', [Command("aéé😀\n", {})]),
    (b'{"execute":"a","id":-0.5e3}', [Command("a", {}, -500.0)]),
    (b'{"execute":"a","id":[0,-0,10,1.5,2E+2,3e-1]}', [Command("a", {}, [0, 0, 10, 1.5, 200.0, 0.3])]),
    (b'{"execute":"a","id":{"b":[true,false,null]}}', [Command("a", {}, {"b": [True, False, None]})]),
    # single quotes, as QEMU takes them
    (b"{'execute':'query-status','id':1}", [STATUS]),
    (b"{'execute':\"it's\"}", [Command("it's", {})]),
    (b"{'execute':'say \"hi\"'}", [Command('say "hi"', {})]),
    (b"{'execute':'it\\'s \\n \\\\ \\u0041'}", [Command("it's \n \\ A", {})]),
    (b'{"execute":"it\\\'s"}', [Command("it's", {})]),
    (b"{'execute':'}\"{'}", [Command('}"{', {})]),
    # values that are no objects
    (b'[1,{"a":2}] ', [NOT_AN_OBJECT]),
    (b'"text"', [NOT_AN_OBJECT]),
    (b"'text'", [NOT_AN_OBJECT]),
    (b"12 -3.5 0\n", [NOT_AN_OBJECT] * 3),
    (b"true\nnull ", [NOT_AN_OBJECT] * 2),
    (b'1{"execute":"query-status","id":1}', [NOT_AN_OBJECT, STATUS]),
    # brackets that do not match
    (b"}", [VALUE]),
    (b"] : ,", [VALUE] * 3),
    (b'{"a":1]', [VALUE]),
    (b'{"a":[}]}', [VALUE, VALUE]),
    (b'{"execute":"query-status","id":1}}', [STATUS, VALUE]),
    # grammar
    (b'{"a":1,}', [VALUE]),
    (b'{"a" 1}', [VALUE]),
    (b'{"a":1,,"b":2}', [VALUE]),
    (b"{'a':1,,'b':2}", [VALUE]),
    (b'{"a":nul}', [VALUE]),
    (b"nul ", [VALUE]),
    (b'{"a":1,"a":2}', [VALUE]),
    (b'{"a":"\\q"}', [VALUE]),
    (b'{"a":"\\ud83d"}', [VALUE]),
    (b'{"a":"\\uD83Dx"}', [VALUE]),
    (b'{"a":"\xed\xa0\x80"}', [VALUE]),
    (b'{"a":"\xc3"}', [VALUE]),
    (b'{"a":1e999}', [VALUE]),
    (b'{"a":' + b"9" * 500 + b"}", [Malformed("QMP input member 'a' is unexpected")]),
    # bytes that cannot be there: start anew at the next promising byte
    (b'@{"execute":"query-status","id":1}', [STRAY, STATUS]),
    (b'@ # "x {"execute":"query-status","id":1}', [STRAY, STATUS]),
    (b'@@@\n@\n{"execute":"query-status","id":1}', [STRAY, STRAY, STATUS]),
    (b'{"a":@ {"execute":"query-status","id":1}', [STRAY, STATUS]),
    (b'{"a":NaN}', [STRAY, VALUE]),
    (b'{"a":E}', [STRAY, VALUE]),
    (b'{"a":"b\x01c"}', [STRAY, VALUE]),
    (b'{"execute":"que\n{"execute":"query-status","id":1}', [STRAY, STATUS]),
    (b'"abc\\\n{"execute":"query-status","id":1}', [STRAY, STATUS]),
    (b"'abc\n{\"execute\":\"query-status\",\"id\":1}", [STRAY, STATUS]),
    (b'\xff{"execute":"query-status","id":1}', [STRAY, STATUS]),
    (b"\xff\xff\xfe", [STRAY] * 3),
    (b'{"a":[[{"b":"\xff{"execute":"query-status","id":1}', [STRAY, STATUS]),
    (b"{[[[{[\xff{\"execute\":\"query-status\",\"id\":1}", [STRAY, STATUS]),
    (b"\x00\x01", [STRAY] * 2),
    (b'{"a"\x0b:1}', [STRAY, VALUE, NOT_AN_OBJECT, VALUE]),
    (b'\xef\xbb\xbf{"execute":"query-status","id":1}', [STRAY, STATUS]),
    # malformed numbers eat the byte that makes them so
    (b"01 ", [STRAY]),
    (b"-x\n", [STRAY]),
    (b'-{"id":1}', [STRAY, VALUE, NOT_AN_OBJECT, VALUE]),
    (b'{"a":1.}\n', [STRAY]),
    (b'{"a":1e,{"execute":"query-status","id":1}', [STRAY, STATUS]),
    (b"[1,-01]", [STRAY, VALUE]),
    (b"1" * 600 + b'\n{"execute":"query-status","id":1}', []),
]  # fmt: skip
NUMBER_TOO_LONG = STREAMS.pop()[0]


@pytest.mark.parametrize(("data", "expected"), STREAMS, ids=lambda value: repr(value)[:40])
def test_streams(data: bytes, expected: list[Any]) -> None:
    assert three_ways(data) == expected


def test_a_number_without_end_is_refused_when_it_is_too_long_to_be_one() -> None:
    assert decode(NUMBER_TOO_LONG) == [NOT_AN_OBJECT, STATUS]  # it came in one piece: nothing was rescanned
    piecemeal = short(decode(NUMBER_TOO_LONG, step=1))
    assert piecemeal == [STRAY, STATUS]
    assert NUMBER_TOO_LONG.index(b"\n") > limits.QMP_NUMBER_BYTES_MAX


def test_an_escape_cut_after_the_backslash_is_waited_for() -> None:
    decoder = Decoder()
    decoder.feed(b'{"execute":"a\\')
    assert decoder.next() is NEED_DATA
    assert decoder.next() is NEED_DATA
    decoder.feed(b'""}')
    assert decoder.next() == Command('a"', {})
    assert decoder.next() is NEED_DATA


def test_is_between_tells_a_cut_value_from_a_clean_end() -> None:
    decoder = Decoder()
    assert decoder.is_between
    decoder.feed(b'{"return":{}} \r\n')
    assert not decoder.is_between  # nothing was looked at yet
    drain(decoder)
    assert decoder.is_between
    decoder.feed(b"[")
    drain(decoder)
    assert not decoder.is_between


# --- limits ---


def test_an_oversized_value_is_one_error_and_is_not_kept() -> None:
    big = b'{"execute":"' + b"x" * 500 + b'","a":[1, "y", {"z": 12345}]}'
    after = b' {"execute":"query-status","id":1}'
    oversized = [BadSyntax("JSON token size limit exceeded"), STATUS]
    for step in (0, 1, 7, 100):
        assert decode(big + after, step=step, max_message_bytes=100) == oversized
    assert decode(b"9" * 300 + b"," + after, max_message_bytes=100)[0] == oversized[0]
    assert decode(b"a" * 300 + after, max_message_bytes=100) == oversized
    assert decode(b"a" * 300 + after, step=1, max_message_bytes=100) == oversized
    assert decode(b'"' + b"a" * 300 + b'"' + after, step=9, max_message_bytes=100) == oversized


def test_a_value_of_exactly_the_limit_is_taken() -> None:
    line = encode_command("x", id="y" * 50).strip()
    for step in (0, 1):
        assert decode(line, step=step, max_message_bytes=len(line)) == [Command("x", {}, "y" * 50)]
        assert short(decode(line, step=step, max_message_bytes=len(line) - 1)) == [VALUE]


def test_an_oversized_value_without_end_holds_no_memory_and_ends_at_an_impossible_byte() -> None:
    decoder = Decoder(max_message_bytes=1000)
    errors = 0
    for chunk in [b'{"a":"', *[b"x" * 100] * 100, b'", "b":[', *[b"1, " * 30] * 100]:
        decoder.feed(chunk)
        errors += len(drain(decoder))
        assert decoder.held_bytes <= 1000 + 100
    assert errors == 1
    decoder.feed(b'\xff{"execute":"query-status","id":1}')
    assert short(drain(decoder)) == [STRAY, STATUS]


def test_nesting_beyond_the_limit_is_one_error_and_skipped_to_its_end() -> None:
    after = b'{"execute":"query-status","id":1}'
    too_deep = b'{"a":' * 5 + b"[]" + b"}" * 5
    deep_error = BadSyntax("JSON nesting depth limit exceeded")
    for step in (0, 1):
        assert decode(too_deep + after, step=step, max_depth=5) == [deep_error, STATUS]
        assert short(decode(too_deep + after, step=step, max_depth=6))[-1] == STATUS
        assert decode(b"[" * 50 + b"]" * 50 + after, step=step, max_depth=5) == [deep_error, STATUS]


def test_nesting_that_only_python_cannot_follow_is_an_error_too() -> None:
    deep = sys.getrecursionlimit() * 2
    assert short(decode(b"[" * deep + b"]" * deep, max_depth=deep)) == [VALUE]


def test_the_default_depth_is_within_what_python_can_follow() -> None:
    deep = limits.QMP_DEPTH_MAX
    assert decode(b"[" * deep + b"]" * deep) == [NOT_AN_OBJECT]


@pytest.mark.parametrize(
    "unit", [b'"', b"[", b"x", b"1", b"\\", b'{"a":', b'"ab",', b" ", b"@", b"'", b"1.5, "], ids=repr
)
def test_each_byte_is_looked_at_a_bounded_number_of_times(unit: bytes) -> None:
    """Work is counted, not timed: the scanner may pass over each byte at most a few times."""
    size = 20_000
    data = (b'{"a":"' if unit == b"\\" else b"{") + unit * (size // len(unit))
    decoder = Decoder(max_depth=4 * size)
    looked_at = 0
    for at in range(0, len(data), 16):
        decoder.feed(data[at : at + 16])
        before = decoder.held_bytes - decoder._position
        drain(decoder)
        looked_at += before
    assert looked_at <= 4 * len(data) + limits.QMP_NUMBER_BYTES_MAX * 2


# --- what messages are ---

SHAPES: list[tuple[Any, Any]] = [
    ({"return": 5}, Reply(5)),
    ({"return": None, "id": None}, Reply(None, None)),
    ({"error": {"class": "C", "desc": "d"}, "id": "x"}, ErrorReply("C", "d", "x")),
    ({"error": {"class": "C", "desc": "d", "data": {"code": "x"}}}, ErrorReply("C", "d", data={"code": "x"})),
    ({"error": {"class": "C", "desc": "d", "data": 5}}, ErrorReply("C", "d")),
    ({"event": "STOP"}, Event("STOP", {})),
    ({"event": "STOP", "data": 7, "timestamp": 7}, Event("STOP", {})),
    ({"event": "A", "timestamp": {"seconds": 2, "microseconds": 3}}, Event("A", {}, 2_000_003)),
    ({"event": "A", "timestamp": {"seconds": -1, "microseconds": -1}}, Event("A", {})),
    ({"QMP": {"version": {"qemu": {}}, "capabilities": ["oob"]}}, Greeting({"qemu": {}}, ("oob",))),
    ({"execute": "a"}, Command("a", {})),
    ({"exec-oob": "a", "id": 1, "arguments": {"b": 2}}, Command("a", {"b": 2}, 1, oob=True)),
    ([], Malformed("QMP input must be a JSON object")),
    ({}, Malformed("QMP input lacks member 'execute'")),
    ({"id": 3}, Malformed("QMP input lacks member 'execute'", 3)),
    ({"execute": 1, "id": 4}, Malformed("QMP input member 'execute' must be a string", 4)),
    ({"exec-oob": 1}, Malformed("QMP input member 'exec-oob' must be a string")),
    ({"execute": "a", "exec-oob": "a"}, Malformed("QMP input member 'execute' clashes with 'exec-oob'")),
    ({"execute": "a", "arguments": []}, Malformed("QMP input member 'arguments' must be an object")),
    ({"execute": "a", "foo": 1}, Malformed("QMP input member 'foo' is unexpected")),
    ({"error": {"class": "C"}}, Malformed("QMP input member 'error' is unexpected")),
    ({"event": 5}, Malformed("QMP input member 'event' is unexpected")),
    ({"QMP": {}}, Malformed("QMP input member 'QMP' is unexpected")),
]  # fmt: skip


@pytest.mark.parametrize(("obj", "expected"), SHAPES, ids=lambda value: repr(value)[:40])
def test_classify(obj: Any, expected: Any) -> None:
    assert classify(obj) == expected


# --- writing ---


def test_every_message_is_one_line_ended_by_crlf_and_reads_back() -> None:
    pairs: list[tuple[bytes, Message]] = [
        (encode_command("a"), Command("a", {})),
        (encode_command("a", {}, id=None), Command("a", {}, None)),
        (encode_command("a", {"é": "\r\n"}, id=[1], oob=True), Command("a", {"é": "\r\n"}, [1], oob=True)),
        (encode_reply({"x": 1}), Reply({"x": 1})),
        (encode_reply([], id="é"), Reply([], "é")),
        (encode_error("C", "d"), ErrorReply("C", "d")),
        (encode_error("C", "d", id=0, data={"k": 1}), ErrorReply("C", "d", 0, {"k": 1})),
        (encode_event("E", timestamp_us=5), Event("E", {}, 5)),
        (encode_event("E", {"a": 1}, timestamp_us=3_000_004), Event("E", {"a": 1}, 3_000_004)),
        (encode_greeting({"qemu": {"major": 1}}, ["oob"]), Greeting({"qemu": {"major": 1}}, ("oob",))),
    ]
    for line, message in pairs:
        assert line.endswith(b"\r\n")
        assert line.isascii()
        assert line.count(b"\n") == 1
        assert decode(line) == [message]
    assert decode(b"".join(line for line, _ in pairs), step=5) == [message for _, message in pairs]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), b"bytes"])
def test_what_json_cannot_say_is_refused_before_anything_is_sent(value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        encode_reply(value)


# --- any bytes at all ---

# On a busy machine it is the making of inputs that is slow; that is no fault of what is tested.
patient = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
any_text = st.text(st.characters(codec="utf-8"), max_size=8)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False, allow_infinity=False)
    | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=5,
)
qmp_like = st.lists(
    st.sampled_from(
        [b"{", b"}", b"[", b"]", b":", b",", b'"', b"'", b"\\", b"\n", b"\xff", b"\xfe", b"\x00", b" ",
         b"1", b"-", b".", b"e", b"0", b"true", b"@", b"\xc3\xa9", b"\\u",
         b'"execute"', b'{"execute":"a"}', b"{'id':1}"]
    ),
    max_size=40,
).map(b"".join)  # fmt: skip


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.binary(max_size=200) | qmp_like, cuts=st.lists(st.integers(1, 20), max_size=20))
@example(data=b"[" * 50, cuts=[])
@example(data=b'"' + b" " * 32 + b"\x00", cuts=[1, 12, 20])  # too long and then impossible, also when it comes at once
@example(data=b"[[[[" + b" " * 40 + b"[", cuts=[20, 20])  # too long and then too deep
def test_any_bytes_give_messages_or_syntax_errors_and_nothing_grows(data: bytes, cuts: list[int]) -> None:
    decoder = Decoder(max_message_bytes=32, max_depth=4)
    messages = []
    rest = data
    for cut in [*cuts, len(data) or 1]:
        decoder.feed(rest[:cut])
        messages += drain(decoder)
        assert decoder.next() is NEED_DATA
        assert decoder.held_bytes <= 32 + max(cut, limits.QMP_NUMBER_BYTES_MAX)
        rest = rest[cut:]
    assert messages == decode(data, max_message_bytes=32, max_depth=4)
    # Whatever came before, one flush makes the decoder hear the next command.
    decoder.feed(b'\n\xff\n{"execute":"ok"}')
    assert drain(decoder)[-1] == Command("ok", {})


json_objects = st.dictionaries(any_text, json_values, max_size=3)


@given(objects=st.lists(json_objects, max_size=3), step=st.integers(1, 40))
@patient
def test_whatever_is_encoded_reads_back(objects: list[dict[str, Any]], step: int) -> None:
    objects = [{**obj, "return": 0} for obj in objects]
    wire = b"".join(encode_object(obj) for obj in objects)
    assert decode(wire, step=step) == [classify(obj) for obj in objects]


@given(obj=json_objects, with_ascii=st.booleans())
@patient
def test_single_quoted_text_means_the_same(obj: dict[str, Any], *, with_ascii: bool) -> None:
    def quoted(value: Any) -> str:
        match value:
            case str():
                body = json.dumps(value, ensure_ascii=with_ascii)[1:-1]
                return "'" + body.replace('\\"', '"').replace("'", "\\'") + "'"
            case list():
                return "[" + ",".join(quoted(entry) for entry in value) + "]"
            case dict():
                members = (quoted(name) + ":" + quoted(entry) for name, entry in value.items())
                return "{" + ",".join(members) + "}"
            case _:
                return json.dumps(value)

    text = quoted({"return": obj})
    assert decode(text.encode()) == [Reply(obj)]


def test_missing_is_not_null() -> None:
    assert Reply(1).id is MISSING
    assert Reply(1, None) != Reply(1)


@pytest.mark.parametrize(
    "line",
    [
        b'{"execute": "stop", "id": 1}\r\n', b' {"execute": "stop"}\n', b'{"return": {}}{"return": 1}\r\n',
        b'{"return": {}}\r\n\r\n', b'{"execute": "stop",}\n', b"{'execute': 'stop'}\n", b'{"a": NaN}\n',
        b'{"return": Infinity}\n', b'{"return": 1e999}\n', b'{"return": {}, "return": {}}\n',
        b'{"return": "\xff"}\n', b'{"return": "\t"}\n', b'{"return": "a\nb"}\n', b'{"return": [[[[1]]]]}\n', b"[1]\n",
        b'{"return": "' + b"x" * 80 + b'"}\n', b'{"strange": 1}\n', b"\n", b'{"return": 01}\n', b'{"return": 0e1}\n',
        b'{"return": "\\ud800"}\n',
    ],
)  # fmt: skip
def test_a_whole_line_means_what_its_bytes_mean_one_by_one(line: bytes) -> None:
    bounds, more = {"max_message_bytes": 64, "max_depth": 4}, b'{"return": 1}\n'
    whole = Decoder(**bounds)
    whole.feed(line)
    found = drain(whole)
    assert short(found) == short(decode(line, step=1, **bounds))
    whole.feed(more)
    assert short(found + drain(whole)) == short(decode(line + more, step=1, **bounds))
