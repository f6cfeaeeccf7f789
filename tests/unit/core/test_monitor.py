"""What a monitor's client has set means for the next migration, and where it sends the guest."""

from __future__ import annotations

from typing import Any

import pytest

from vmferry.core.monitor import Setup, Wish, destination_of
from vmferry.core.option_table import OPTIONS, Kind, Policy
from vmferry.core.options import Mode
from vmferry.errors import UsageError

HOSTS = {"host-b": ("10.0.0.2", "fd00::2"), "host-c": ("10.0.0.3",)}


def caps(**states: Any) -> dict[str, Any]:
    return {"capabilities": [{"capability": name.replace("_", "-"), "state": state} for name, state in states.items()]}


@pytest.mark.parametrize(
    ("arguments", "host"),
    [
        ({"uri": "vmferry:host-c"}, "host-c"),
        ({"uri": "tcp:host-b:4444"}, "host-b"),
        ({"uri": "tcp:10.0.0.3:0"}, "host-c"),
        ({"uri": "tcp:10.0.0.3"}, "host-c"),
        ({"uri": "tcp:[fd00::2]:4444"}, "host-b"),
        ({"channels": [{"channel-type": "main", "addr": {"transport": "socket", "type": "inet", "host": "10.0.0.2",
                                                         "port": "4444"}}]}, "host-b"),
    ],
)  # fmt: skip
def test_where_a_client_sends_the_guest(arguments: dict[str, Any], host: str) -> None:
    assert destination_of(arguments, HOSTS) == host


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"uri": "tcp:10.9.9.9:1"}, r"10.9.9.9 is not a known host \(known: host-b, host-c\)"),
        ({"uri": "exec:cat > /dev/null"}, "leads to no host"),
        ({"uri": "tcp:"}, "leads to no host"),
        ({"uri": "host-b"}, "leads to no host"),
        ({}, "needs a uri"),
        ({"uri": 7}, "needs a uri"),
        ({"channels": []}, "needs a uri"),
        ({"channels": ["main"]}, "needs a uri"),
        ({"channels": [{"addr": "host-b"}]}, "needs a uri"),
        ({"channels": [{"addr": {"transport": "socket", "type": "unix", "path": "/x"}}]}, "needs a uri"),
        ({"channels": [{"addr": {"transport": "exec", "args": []}}]}, "needs a uri"),
    ],
)
def test_a_place_that_is_none_is_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        destination_of(arguments, HOSTS)
    with pytest.raises(UsageError, match=r"known: none|needs a uri|leads to no host"):
        destination_of(arguments, {})


def test_a_client_that_says_nothing_gets_what_qemu_would_do() -> None:
    assert Setup().wish() == Wish(Mode.PRECOPY)


def test_what_was_set_beforehand_is_the_next_migration() -> None:
    setup = (
        Setup()
        .with_capabilities(caps(postcopy_ram=True, events=True, auto_converge=True, multifd=True))
        .with_parameters({"max-bandwidth": 1 << 30, "downtime-limit": 200, "multifd-channels": 4, "tls-creds": ""})
        .with_capabilities(caps(pause_before_switchover=True, multifd=True))
    )
    assert setup.wish() == Wish(
        Mode.POSTCOPY,
        4,
        {"auto-converge": True, "max-bandwidth": 1 << 30, "downtime-limit": 200},
        True,
    )
    assert setup.shown(Kind.CAPABILITY)["auto-converge"] is True
    assert setup.shown(Kind.PARAMETER)["multifd-channels"] == 4
    later = setup.with_capabilities(caps(postcopy_ram=False, pause_before_switchover=False))
    assert (later.wish().mode, later.wish().waits) == (Mode.PRECOPY, False)
    only = Setup().with_capabilities(caps(multifd=True))
    assert only.wish().multifd_channels == OPTIONS["multifd-channels"].qemu_default


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option.policy is Policy.FORBIDDEN])
def test_what_vmferry_never_does_is_refused_when_it_is_said(name: str) -> None:
    option = OPTIONS[name]
    if option.kind is not Kind.CAPABILITY:
        return
    with pytest.raises(UsageError, match=name):
        Setup().with_capabilities({"capabilities": [{"capability": name, "state": True}]})
    assert Setup().with_capabilities({"capabilities": [{"capability": name, "state": False}]}).wish().config == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"downtime-limit": 1 << 40}, "out of range"),
        ({"downtime-limit": "soon"}, "cannot be"),
        ({"downtime-limit": True}, "cannot be"),
        ({"downtime-limit": [1]}, "cannot be"),
        ({"downtime-limits": 1}, "did you mean downtime-limit"),
        ({"auto-converge": True}, "is a capability"),
        ({"tls-creds": "tls0"}, "certificates"),
    ],
)
def test_a_wrong_parameter_is_told_as_it_is_said(arguments: dict[str, Any], words: str) -> None:
    before = Setup().with_parameters({"downtime-limit": 100})
    with pytest.raises(UsageError, match=words):
        before.with_parameters({"max-bandwidth": 1, **arguments})
    assert before.shown(Kind.PARAMETER) == {"downtime-limit": 100}


@pytest.mark.parametrize(
    "arguments",
    [{}, {"capabilities": {}}, {"capabilities": [7]}, {"capabilities": [{"capability": "xbzrle", "state": "on"}]}],
)
def test_capabilities_have_the_form_that_qemu_wants(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="capabilit"):
        Setup().with_capabilities(arguments)
    with pytest.raises(UsageError, match="is a parameter"):
        Setup().with_capabilities(caps(downtime_limit=True))
