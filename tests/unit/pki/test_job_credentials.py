"""A job's credentials: only the peer of this job is let in, and nothing stays behind."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from vmferry.errors import NotTrusted, Unfit
from vmferry.pki import certificates, files, job_credentials
from vmferry.pki.job_credentials import JobCredentials, Role

NOW = datetime.now(UTC)


def make(tmp_path: Path, role: Role, job: str = "job-1", now: datetime = NOW) -> JobCredentials:
    return job_credentials.make(job, role, tmp_path, now=now)


def handshake(server_room: Path, client_room: Path, name: str) -> None:
    """What GnuTLS in QEMU does, with OpenSSL: both verify, and the client wants `name`."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_verify_locations(server_room / "ca-cert.pem")
    server.load_cert_chain(server_room / "server-cert.pem", server_room / "server-key.pem")
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(client_room / "ca-cert.pem")
    client.load_cert_chain(client_room / "client-cert.pem", client_room / "client-key.pem")
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    at_client = client.wrap_bio(down, up, server_hostname=name)
    at_server = server.wrap_bio(up, down, server_side=True)
    for _ in range(2):
        for end in (at_client, at_server):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert at_server.version() == "TLSv1.3"


def test_both_sides_of_a_job_accept_each_other(tmp_path: Path) -> None:
    source, destination = make(tmp_path, "source"), make(tmp_path, "destination")
    source.accept_peer(destination.ca_pem_own)
    destination.accept_peer(source.ca_pem_own)
    handshake(destination.directory, source.directory, job_credentials.tls_hostname("job-1"))
    assert source.directory.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in source.directory.iterdir()) == [
        "ca-cert.pem", "client-cert.pem", "client-key.pem",
    ]  # fmt: skip
    assert (destination.directory / "server-key.pem").stat().st_mode & 0o777 == 0o600
    assert (source.directory / "ca-cert.pem").read_bytes() == destination.ca_pem_own


@pytest.mark.parametrize("stranger", ["source", "destination"])
def test_another_job_is_refused(tmp_path: Path, stranger: Role) -> None:
    source, destination = make(tmp_path, "source"), make(tmp_path, "destination")
    own = {"source": source.ca_pem_own, "destination": destination.ca_pem_own}
    if stranger == "source":
        source = make(tmp_path, "source")
    else:
        destination = make(tmp_path, "destination")
    source.accept_peer(own["destination"])
    destination.accept_peer(own["source"])
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(destination.directory, source.directory, job_credentials.tls_hostname("job-1"))


def test_another_job_is_not_at_that_name(tmp_path: Path) -> None:
    source, destination = make(tmp_path, "source"), make(tmp_path, "destination")
    source.accept_peer(destination.ca_pem_own)
    destination.accept_peer(source.ca_pem_own)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(destination.directory, source.directory, job_credentials.tls_hostname("job-2"))


def test_nothing_is_written_until_the_peer_is_known(tmp_path: Path) -> None:
    make(tmp_path, "source")
    assert list(tmp_path.iterdir()) == []


def test_keys_are_not_shown(tmp_path: Path) -> None:
    assert "PRIVATE" not in repr(make(tmp_path, "source"))


def test_clocks_may_differ(tmp_path: Path) -> None:
    certificate = x509.load_pem_x509_certificate(make(tmp_path, "source").ca_pem_own)
    assert NOW - certificate.not_valid_before_utc >= timedelta(days=2)
    assert certificate.not_valid_after_utc - NOW >= timedelta(days=6)


@pytest.mark.parametrize("role", ["source", "destination"])
def test_what_qemu_is_told(tmp_path: Path, role: Role) -> None:
    made = make(tmp_path, role, job="job/1 ö")
    told: dict[str, Any] = job_credentials.tls_creds_object("job/1 ö", role, tmp_path)
    assert told["dir"] == str(made.directory)
    assert told["endpoint"] == ("client" if role == "source" else "server")
    assert told["verify-peer"] is True
    assert told["id"].replace("-", "").isalnum()
    assert told["priority"] == job_credentials.tls_priority((7, 2, 22))
    assert "TLS1.3" not in told["priority"]
    # Both must be able to meet an older QEMU, which has TLS 1.2 only.
    assert "+VERS-TLS1.3:+VERS-TLS1.2" in job_credentials.tls_priority((10, 1, 0))
    other = job_credentials.tls_creds_object("j", role, tmp_path, priority="NORMAL")
    assert other["priority"] == "NORMAL"


def leaf_pem(tmp_path: Path) -> bytes:
    made = make(tmp_path, "source")
    return made._files["client-cert.pem"]


def test_only_one_authority_is_accepted_as_a_peer(tmp_path: Path) -> None:
    source, good = make(tmp_path, "source"), make(tmp_path, "destination").ca_pem_own
    for bad in (b"", b"rubbish", good + good, leaf_pem(tmp_path), good * 9):
        with pytest.raises(NotTrusted, match="the peer sent"):
            source.accept_peer(bad)
    assert not source.directory.exists()


def test_accepting_again_replaces_what_an_earlier_try_left(tmp_path: Path) -> None:
    source, peer = make(tmp_path, "source"), make(tmp_path, "destination")
    source.accept_peer(peer.ca_pem_own)
    again = make(tmp_path, "source")
    again.accept_peer(peer.ca_pem_own)
    assert (again.directory / "client-key.pem").read_bytes() == again._files["client-key.pem"]


def test_files_that_cannot_be_written_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, peer = make(tmp_path, "source"), make(tmp_path, "destination")

    def fail(path: Path, content: bytes, *, mode: int) -> None:
        if path.name == "client-key.pem":
            raise OSError(28, "No space left on device")
        path.write_bytes(content)

    monkeypatch.setattr(files, "write_volatile", fail)
    with pytest.raises(Unfit, match="No space left"):
        source.accept_peer(peer.ca_pem_own)
    assert list(tmp_path.iterdir()) == []


def test_remove_and_left_overs(tmp_path: Path) -> None:
    peer = make(tmp_path, "destination").ca_pem_own
    made = {job: make(tmp_path, "source", job) for job in ("one", "two", "three")}
    for credentials in made.values():
        credentials.accept_peer(peer)
    made["one"].remove()
    made["one"].remove()
    assert not made["one"].directory.exists()
    (tmp_path / "job-of-somebody-else").mkdir()
    assert job_credentials.remove_left_overs(tmp_path, keep=["two"]) == (made["three"].directory,)
    assert made["two"].directory.exists()
    job_credentials.remove_job("two", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["job-of-somebody-else"]
    assert job_credentials.remove_left_overs(tmp_path / "none", keep=()) == ()


def test_the_leaf_cannot_be_used_for_the_other_end(tmp_path: Path) -> None:
    leaf = x509.load_pem_x509_certificate(leaf_pem(tmp_path))
    assert list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [certificates.CLIENT]
