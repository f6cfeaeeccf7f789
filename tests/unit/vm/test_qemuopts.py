"""QEMU's comma rule, both ways."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.vm import qemuopts

KEYS = st.text(st.characters(exclude_characters="=,", codec="ascii", categories=["L", "N", "P"]), min_size=1)
VALUES = st.one_of(st.none(), st.text(st.sampled_from("ab=,.: {}/")), st.text())
PAIRS = st.lists(st.tuples(KEYS, VALUES)).map(tuple)


@given(PAIRS)
def test_what_is_written_reads_back(pairs: qemuopts.Pairs) -> None:
    assert qemuopts.parse(qemuopts.render(pairs)) == pairs


@given(PAIRS)
def test_what_is_written_reads_back_with_an_implied_key(pairs: qemuopts.Pairs) -> None:
    if pairs and pairs[0][1] is None:
        with pytest.raises(ValueError, match="cannot come first"):
            qemuopts.render(pairs, implied="type")
    else:
        assert qemuopts.parse(qemuopts.render(pairs, implied="type"), implied="type") == pairs
        first_key = (("type", pairs[0][1]), *pairs[1:]) if pairs else ()
        assert qemuopts.parse(qemuopts.render(first_key, implied="type"), implied="type") == first_key


@given(st.text(st.sampled_from("ab=,n"), max_size=12))
def test_any_text_reads_or_is_refused_and_then_is_stable(text: str) -> None:
    try:
        pairs = qemuopts.parse(text, implied="x")
    except ValueError:
        return
    assert qemuopts.parse(qemuopts.render(pairs, implied="x"), implied="x") == pairs


@pytest.mark.parametrize(
    ("text", "implied", "pairs"),
    [
        ("", "type", ()),
        ("q35", "type", (("type", "q35"),)),
        ("q35,accel=kvm", "type", (("type", "q35"), ("accel", "kvm"))),
        ("file=/a,,b.img,snapshot", None, (("file", "/a,b.img"), ("snapshot", None))),
        ("/a,,b=c", "path", (("path", "/a,b=c"),)),
        ("a=,b", None, (("a", ""), ("b", None))),
        ("socket,id=x,path=/p,server,nowait", "backend",
         (("backend", "socket"), ("id", "x"), ("path", "/p"), ("server", None), ("nowait", None))),
    ],
)  # fmt: skip
def test_examples_from_real_command_lines(text: str, implied: str | None, pairs: qemuopts.Pairs) -> None:
    assert qemuopts.parse(text, implied=implied) == pairs


def test_get_takes_the_last_and_knows_both_spellings_of_a_flag() -> None:
    pairs = qemuopts.parse("a=1,wait,a=2,noserver")
    assert qemuopts.get(pairs, "a") == "2"
    assert qemuopts.is_on(qemuopts.get(pairs, "wait"))
    assert qemuopts.get(pairs, "server") == "off"
    assert qemuopts.get(pairs, "absent") is None


def test_put_and_drop_keep_the_order_of_the_rest() -> None:
    pairs = qemuopts.parse("a=1,nowait,b=2,a=3")
    assert qemuopts.put(pairs, "a", "9") == (("a", "9"), ("nowait", None), ("b", "2"))
    assert qemuopts.put(pairs, "wait", "off") == (("a", "1"), ("wait", "off"), ("b", "2"), ("a", "3"))
    assert qemuopts.put(pairs, "c", "4")[-1] == ("c", "4")
    assert qemuopts.drop(pairs, "a", "wait") == (("b", "2"),)


def test_json_form() -> None:
    assert qemuopts.is_json('{"driver":"raw"}')
    assert not qemuopts.is_json("driver=raw")
    assert qemuopts.parse_json(qemuopts.render_json({"a": [1, True]})) == {"a": [1, True]}
    with pytest.raises(ValueError, match="JSON"):
        qemuopts.parse_json("[1]")


def test_keys_that_no_text_can_express_are_refused() -> None:
    for key in ("", "a=b", "a,b"):
        with pytest.raises(ValueError, match="cannot be the name"):
            qemuopts.render(((key, "x"),))
