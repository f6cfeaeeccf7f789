"""The tree of errors: exit codes, five answers, and the way over the wire and back."""

from __future__ import annotations

import pytest

from vmferry.errors import (
    ERROR_CLASSES,
    Busy,
    GuestLost,
    HostUnreachable,
    MigrationFailed,
    UnknownVm,
    VmferryError,
    docs_markdown,
    from_wire,
)

by_class = pytest.mark.parametrize("cls", ERROR_CLASSES, ids=lambda cls: cls.__name__)


def every_subclass(cls: type[VmferryError]) -> set[type[VmferryError]]:
    found = {cls}
    for sub in cls.__subclasses__():
        found |= every_subclass(sub)
    return found


def test_exit_codes_and_names_belong_to_one_class_each() -> None:
    assert len({cls.exit_code for cls in ERROR_CLASSES}) == len(ERROR_CLASSES)
    assert len({cls.code for cls in ERROR_CLASSES}) == len(ERROR_CLASSES)
    assert 0 not in {cls.exit_code for cls in ERROR_CLASSES}


def test_no_exit_code_is_ever_reused() -> None:
    """Scripts rely on these numbers: a new class takes the next one, a removed one leaves a hole."""
    assert {cls.code: cls.exit_code for cls in ERROR_CLASSES} == {
        "error": 1, "usage": 2, "spec": 3, "unknown-vm": 4, "unknown-host": 5, "host-unreachable": 6,
        "not-trusted": 7, "refused": 8, "busy": 9, "option-locked": 10, "failed": 11, "cancelled": 12,
        "uncertain": 13, "held": 14, "lost": 15, "agent-unreachable": 16, "qemu": 17, "cancel-refused": 18,
        "unfit": 19, "protocol": 20, "rescue-refused": 21, "job-refused": 22, "unknown-job": 23, "blocked": 24,
        "repository": 25, "file": 26,
    }  # fmt: skip


@by_class
def test_every_class_says_in_a_sentence_what_it_is(cls: type[VmferryError]) -> None:
    assert cls.__doc__
    assert cls.__doc__.strip().endswith(".")


@by_class
def test_an_error_is_the_same_after_the_way_over_the_wire(cls: type[VmferryError]) -> None:
    error = cls("vm1 did something", side="both", guest="paused", retry="no", hint="look", cause="a reason")
    back = from_wire(error.to_wire())
    assert type(back) is cls
    assert back.to_wire() == error.to_wire()
    assert str(back) == "vm1 did something"


@by_class
def test_the_defaults_survive_the_wire(cls: type[VmferryError]) -> None:
    assert from_wire(cls("x").to_wire()).to_wire() == cls("x").to_wire()


def test_an_unknown_code_becomes_the_plain_error() -> None:
    error = from_wire({"code": "from-the-future", "message": "new", "hint": "read"})
    assert type(error) is VmferryError
    assert (error.message, error.hint) == ("new", "read")
    assert from_wire({}).message == "no message"


def test_a_cause_is_a_chain_that_crosses_hosts() -> None:
    there = MigrationFailed("the device is missing", side="destination")
    here = Busy("vm1 is busy", cause=there)
    assert here.cause == there.to_wire()
    further = UnknownVm("no vm1", cause=here.to_wire())
    assert further.cause is not None
    assert further.cause["cause"]["message"] == "the device is missing"


def test_a_cause_may_be_any_exception_with_its_own_causes() -> None:
    try:
        try:
            raise OSError("no route")
        except OSError as inner:
            raise ValueError from inner
    except ValueError as outer:
        error = HostUnreachable("host-b does not answer", cause=outer)
    assert error.cause == {
        "code": "ValueError",
        "message": "ValueError",
        "cause": {"code": "OSError", "message": "no route", "cause": None},
    }
    assert GuestLost("gone").cause is None


def test_the_document_has_every_exit_code_once() -> None:
    text = docs_markdown()
    for cls in ERROR_CLASSES:
        assert text.count(f"| {cls.exit_code} | `{cls.code}` |") == 1
        assert " ".join(str(cls.__doc__).split()) in text
    assert "| 0 |" in text
