"""`vmferry pki`: one command for a set-up of two hosts, and what it refuses."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from vmferry.testing.hosts import Guests, MakePair, boot, run_cli

pytestmark = pytest.mark.real

HOSTS = ("host-a=10.0.0.1", "host-b=10.0.0.2,b.example")


def test_one_command_makes_everything_and_twice_is_once(tmp_path: Path) -> None:
    folder = tmp_path / "pki"
    first = run_cli("pki", str(folder), *HOSTS, "--json")
    assert first.code == 0, first.err
    assert first.json["authority_made"] is True
    assert sorted(first.json["made"]) == ["host-a", "host-b"]
    before = {path: path.read_bytes() for path in folder.rglob("*.pem")}
    again = run_cli("pki", str(folder), *HOSTS, "--json")
    assert (again.json["made"], sorted(again.json["kept"])) == ([], ["host-a", "host-b"])
    assert {path: path.read_bytes() for path in folder.rglob("*.pem")} == before
    keys = [path for path in before if b"PRIVATE KEY" in before[path]]
    assert keys
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in keys} == {0}
    text = run_cli("pki", str(folder), *HOSTS, "host-c=10.0.0.3")
    assert f"{folder / 'host-c'}: copy to host-c" in text.out
    assert f"{folder / 'host-a'}: kept as it was" in text.out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "name the hosts"),
        (["host-a"], "write HOST=ADDRESS"),
        (["../evil=10.0.0.1"], "../evil"),
        (["host-a=10.0.0.1", "--days", "0"], "days"),
        (["host-a=10.0.0.1", "--days", "soon"], "soon"),
        (["host-a=10.0.0.1", "host-b="], "'host-b=' is not a host"),
    ],
)
def test_what_is_refused_writes_nothing(words: list[str], text: str, tmp_path: Path) -> None:
    folder = tmp_path / "pki"
    done = run_cli("pki", str(folder), *words, "--json")
    assert done.code == 2, done.out
    assert text in done.error["message"]
    assert not folder.exists()


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run_cli("pki", str(tmp_path / "file" / "pki"), *HOSTS, "--json")
    assert done.code == 19
    assert str(tmp_path / "file") in done.error["message"]


def test_renewed_certificates_are_trusted_by_those_not_renewed(
    make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    """host-b gets a new certificate and a restart; host-a knows nothing of it."""
    folder = tmp_path / "pki"
    assert run_cli("pki", str(folder), *HOSTS).code == 0
    pair = make_pair(pki_of={"host-a": folder / "host-a", "host-b": folder / "host-b"})
    boot(pair.a, guests.boot())
    assert pair.a.ok("plan", "web1", "host-b")["possible"]
    renewed = run_cli("pki", "--renew", "--json", str(folder), "host-b")
    assert (renewed.code, renewed.json["made"]) == (0, ["host-b"])
    pair.b.kill()
    pair.b.restart()
    assert pair.a.ok("migrate", "web1", "host-b")["outcome"] == "destination"
