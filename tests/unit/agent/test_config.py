"""What an agent is told at start: a file, flags over it, and plain words for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmferry.agent.config import (
    DEFAULT_PORT,
    Address,
    AgentConfig,
    PeerConfig,
    from_mapping,
    load,
    parse_address,
    parse_peer,
)
from vmferry.errors import UsageError


@pytest.mark.parametrize(
    ("text", "address", "written"),
    [
        ("10.0.0.1:7601", Address("10.0.0.1", 7601), "10.0.0.1:7601"),
        ("10.0.0.1", Address("10.0.0.1", DEFAULT_PORT), f"10.0.0.1:{DEFAULT_PORT}"),
        ("[fd00::1]:7601", Address("fd00::1", 7601), "[fd00::1]:7601"),
        ("[fd00::1]", Address("fd00::1", DEFAULT_PORT), f"[fd00::1]:{DEFAULT_PORT}"),
        ("fd00::1", Address("fd00::1", DEFAULT_PORT), f"[fd00::1]:{DEFAULT_PORT}"),
        ("host-b:0", Address("host-b", 0), "host-b:0"),
    ],
)
def test_addresses(text: str, address: Address, written: str) -> None:
    assert parse_address(text) == address
    assert str(address) == written


@pytest.mark.parametrize("text", ["", ":7600", "host:port", "host:-1", "host:65536", "[]:1"])
def test_what_is_not_an_address(text: str) -> None:
    with pytest.raises(UsageError, match="is not an address"):
        parse_address(text)


def test_a_peer_has_a_name_and_addresses_to_try_in_order() -> None:
    assert parse_peer("host-b=10.0.0.2:1,10.1.0.2") == PeerConfig(
        "host-b", (Address("10.0.0.2", 1), Address("10.1.0.2", DEFAULT_PORT))
    )


@pytest.mark.parametrize("text", ["host-b", "=10.0.0.2", "host-b=", ""])
def test_what_is_not_a_peer(text: str) -> None:
    with pytest.raises(UsageError, match="is not a peer"):
        parse_peer(text)


def test_what_follows_from_what() -> None:
    config = AgentConfig("host-a", state_dir=Path("/s"), runtime_dir=Path("/r"))
    assert config.control_socket == Path("/r/agent.sock")
    assert config.journal_path == Path("/s/journal.sqlite")
    assert config.data_address == "127.0.0.1"
    listening = AgentConfig("host-a", listen=Address("10.0.0.1", 1), socket=Path("/x.sock"))
    assert listening.control_socket == Path("/x.sock")
    assert listening.data_address == "10.0.0.1"
    several = AgentConfig("host-a", listen=Address("10.0.0.1", 1), migration_address=("10.9.0.1", "10.8.0.1"))
    assert several.data_addresses == ("10.9.0.1", "10.8.0.1")
    assert several.data_address == "10.9.0.1"
    assert listening.data_addresses == ("10.0.0.1",)


def test_every_setting_can_be_given_by_name() -> None:
    config = from_mapping(
        None,
        {
            "name": "host-a",
            "state-dir": "/s",
            "runtime_dir": "/r",
            "socket": "/x.sock",
            "pki-dir": "/p",
            "listen": "10.0.0.1:7",
            "migration-address": "10.9.0.1",
            "migration-ports": "50000-50003",
            "clear-text": True,
            "peers": {"host-b": "10.0.0.2:7"},
            "qemu": "qemu-mine",
        },
        origin="test",
    )
    assert config == AgentConfig(
        name="host-a",
        state_dir=Path("/s"),
        runtime_dir=Path("/r"),
        socket=Path("/x.sock"),
        listen=Address("10.0.0.1", 7),
        migration_address=("10.9.0.1",),
        migration_ports=(50000, 50003),
        pki_dir=Path("/p"),
        clear_text=True,
        peers={"host-b": PeerConfig("host-b", (Address("10.0.0.2", 7),))},
        qemu="qemu-mine",
    )


def test_an_agent_may_forbid_clear_text_and_then_cannot_speak_it_itself() -> None:
    base = from_mapping(None, {"name": "host-a", "tls-only": True}, origin="file")
    assert base == AgentConfig("host-a", tls_only=True)
    with pytest.raises(UsageError, match="flags: clear_text and tls_only together"):
        from_mapping(base, {"clear_text": True}, origin="flags")


def test_flags_win_over_the_file_and_peers_are_added() -> None:
    base = from_mapping(None, {"name": "host-a", "peers": {"host-b": "10.0.0.2"}}, origin="file")
    config = from_mapping(base, {"peers": ["host-c=10.0.0.3"], "migration_ports": "0"}, origin="flags")
    assert sorted(config.peers) == ["host-b", "host-c"]
    assert config.migration_ports == (0, 0)
    assert config.name == "host-a"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"nmae": "x"}, "'nmae' is not a setting"),
        ({"state_dir": 7}, "state_dir = 7 cannot be read"),
        ({"migration_ports": "a-b"}, "migration_ports = 'a-b' cannot be read"),
        ({"peers": 7}, "peers = 7 cannot be read"),
        ({"listen": "x:y"}, "is not an address"),
        ({}, "needs a name"),
    ],
)
def test_what_is_wrong_is_said_with_where_it_stands(values: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        from_mapping(None, dict(values), origin="host-a.toml")


def test_a_file_and_flags(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text('name = "host-a"\nlisten = "10.0.0.1:7"\n[peers]\nhost-b = "10.0.0.2:7"\n')
    config = load(path, {"listen": "10.0.0.9:7"})
    assert (config.name, config.listen, list(config.peers)) == ("host-a", Address("10.0.0.9", 7), ["host-b"])


def test_the_name_may_come_from_a_flag_alone(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text('qemu = "q"\n')
    assert load(path, {"name": "host-z"}).name == "host-z"
    assert load(None, {"name": "host-z"}) == AgentConfig("host-z")


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe"])
def test_a_file_that_is_not_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "agent.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="cannot be read as TOML"):
        load(path, {"name": "x"})
    with pytest.raises(UsageError, match="cannot be read as TOML"):
        load(tmp_path / "absent.toml", {"name": "x"})


def test_where_snapshots_are_kept() -> None:
    config = from_mapping(None, {"name": "a", "state_dir": "/s", "repository_options": {"region": 1}}, origin="file")
    assert (config.repository, config.repository_folder) == ("", Path("/s/repository"))
    assert config.repository_options == {"region": "1"}
