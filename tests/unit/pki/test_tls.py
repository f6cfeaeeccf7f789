"""TLS between agents: TLS 1.3, both verified, the name pinned; every refusal is one sentence."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from vmferry.errors import HostUnreachable, NotTrusted, VmferryError
from vmferry.pki import authority, certificates, tls

NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """host-a and host-b of one authority, host-x of another, and some whose certificates are not right."""
    base = tmp_path_factory.mktemp("pki")
    authority.init(base, {"host-a": [], "host-b": []}, now=NOW)
    authority.init(base / "other", {"host-x": []}, now=NOW)
    (base / "other" / "host-x").rename(base / "host-x")
    # host-y is of the other authority too, but would trust host-a: only host-a can refuse it.
    shutil.copytree(base / "host-x", base / "host-y")
    shutil.copy(base / "ca" / "ca-cert.pem", base / "host-y" / "ca-cert.pem")
    key = authority._read_key(base / "ca" / "ca-key.pem")
    parent = authority._read_certificate(base / "ca" / "ca-cert.pem")
    for host, shift, purposes, names in (
        ("host-old", timedelta(days=-9), (certificates.SERVER, certificates.CLIENT), ["vmferry://agent/host-old"]),
        ("host-new", timedelta(days=9), (certificates.SERVER, certificates.CLIENT), ["vmferry://agent/host-new"]),
        ("host-client", timedelta(0), (certificates.CLIENT,), ["vmferry://agent/host-client"]),
        ("host-nameless", timedelta(0), (certificates.SERVER, certificates.CLIENT), ["https://example"]),
        ("host-two", timedelta(0), (certificates.SERVER, certificates.CLIENT), ["vmferry://agent/a", "vmferry://agent/b"]),
    ):  # fmt: skip
        authority.init(base, {host: []}, now=NOW)
        leaf_key = authority._read_key(base / host / "agent-key.pem")
        leaf = certificates.make_leaf(
            parent, key, leaf_key.public_key(), host,
            names=[x509.UniformResourceIdentifier(name) for name in names], purposes=purposes,
            not_before=NOW + shift - timedelta(hours=1), not_after=NOW + shift + timedelta(days=1),
        )  # fmt: skip
        (base / host / "agent-cert.pem").write_bytes(certificates.certificate_pem(leaf))
    return base


class Meeting:
    """Two blocking ends in memory: no socket, no thread, exact errors."""

    def __init__(self, server: ssl.SSLContext, client: ssl.SSLContext) -> None:
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.up, self.down = up, down
        self.client = client.wrap_bio(down, up)
        self.server = server.wrap_bio(up, down, server_side=True)
        self.errors: dict[str, ssl.SSLError] = {}

    def run(self) -> Meeting:
        for _ in range(3):
            for side, end in (("client", self.client), ("server", self.server)):
                if side in self.errors:
                    continue
                try:
                    end.do_handshake()
                    end.read(1)
                except ssl.SSLWantReadError:
                    continue
                except ssl.SSLError as error:
                    self.errors[side] = error
        return self

    def sentence(self, side: str) -> str:
        explained = tls.explain(self.errors[side], "host-z")
        assert type(explained) is NotTrusted
        return explained.message


def meeting(rooms: Path, server: str, client: str) -> Meeting:
    return Meeting(tls.server_context(rooms / server), tls.client_context(rooms / client)).run()


def test_two_agents_of_one_setup_know_each_other(rooms: Path) -> None:
    met = meeting(rooms, "host-b", "host-a")
    assert met.errors == {}
    assert met.client.version() == "TLSv1.3"
    assert (tls.peer_name(met.client), tls.peer_name(met.server)) == ("host-b", "host-a")
    tls.check_peer(met.client, "host-b")
    with pytest.raises(NotTrusted, match="answers for host-c shows the certificate of host-b"):
        tls.check_peer(met.client, "host-c")


@pytest.mark.parametrize("host", ["host-nameless", "host-two"])
def test_a_peer_that_names_no_single_agent(rooms: Path, host: str) -> None:
    met = meeting(rooms, host, "host-a")
    with pytest.raises(NotTrusted, match="does not name one agent"):
        tls.peer_name(met.client)


def test_a_connection_without_a_certificate_names_nobody(rooms: Path) -> None:
    met = Meeting(tls.server_context(rooms / "host-a"), tls.client_context(rooms / "host-b"))
    with pytest.raises(ValueError, match="handshake"):
        tls.peer_name(met.client)
    anonymous = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    anonymous.load_cert_chain(rooms / "host-a" / "agent-cert.pem", rooms / "host-a" / "agent-key.pem")
    met = Meeting(anonymous, tls.client_context(rooms / "host-b")).run()
    with pytest.raises(NotTrusted, match="does not name one agent"):
        tls.peer_name(met.server)


@pytest.mark.parametrize(
    ("server", "client", "side", "sentence"),
    [
        ("host-old", "host-a", "client", "the certificate of host-z has expired"),
        ("host-new", "host-a", "client", "the certificate of host-z is not valid yet"),
        ("host-x", "host-a", "client", "signed by an authority that this host does not know"),
        ("host-client", "host-a", "client", "was not made for an agent"),
        ("host-a", "host-old", "server", "the certificate of host-z has expired"),
        ("host-a", "host-y", "server", "signed by an authority that this host does not know"),
        # What the refused side is told by the other.
        ("host-old", "host-a", "server", "host-z says that this host's certificate has expired"),
        (
            "host-x",
            "host-a",
            "server",
            "host-z does not know the authority that signed this host's certificate",
        ),
        ("host-a", "host-old", "client", "host-z says that this host's certificate has expired"),
        (
            "host-a",
            "host-y",
            "client",
            "host-z does not know the authority that signed this host's certificate",
        ),
    ],
)
def test_who_is_refused_learns_why(rooms: Path, server: str, client: str, side: str, sentence: str) -> None:
    assert sentence in meeting(rooms, server, client).sentence(side)


def test_a_client_without_a_certificate(rooms: Path) -> None:
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(rooms / "host-a" / "ca-cert.pem")
    met = Meeting(tls.server_context(rooms / "host-a"), client).run()
    assert met.sentence("server") == "host-z showed no certificate"
    assert met.sentence("client") == "host-z demands a certificate and this side showed none"


def test_an_older_tls_is_refused(rooms: Path) -> None:
    client = tls.client_context(rooms / "host-b")
    client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_2
    met = Meeting(tls.server_context(rooms / "host-a"), client).run()
    assert met.sentence("server") == "host-z does not speak TLS 1.3"
    assert met.sentence("client") == "host-z does not speak TLS 1.3"


@pytest.mark.parametrize("text", [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"VMFERRY\x01" * 20, b"\0" * 200])
@pytest.mark.parametrize("side", ["server", "client"])
def test_a_peer_that_speaks_no_tls(rooms: Path, text: bytes, side: str) -> None:
    met = Meeting(tls.server_context(rooms / "host-a"), tls.client_context(rooms / "host-b"))
    (met.up if side == "server" else met.down).write(text)
    end = met.server if side == "server" else met.client
    with pytest.raises(ssl.SSLError) as caught:
        end.do_handshake()
    explained = tls.explain(caught.value, "host-z")
    assert explained.message == "host-z does not speak TLS; is another program at that address?"


def verification_error(code: int, message: str) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "failed")
    error.verify_code, error.verify_message = code, message
    return error


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (verification_error(999, "the {moon}"), NotTrusted,
         "the certificate of {b} cannot be trusted (the {moon})"),
        (ssl.SSLError(1, "odd"), NotTrusted, "{b} and this host cannot agree on TLS: odd"),
        (ssl.SSLEOFError(8, "EOF"), HostUnreachable,
         "{b} closed the connection in the middle of the greeting"),
        (ConnectionRefusedError(111, "x"), HostUnreachable, "no agent listens at the address of {b}"),
        (TimeoutError(), HostUnreachable, "{b} did not answer in time"),
        (socket.gaierror(-2, "Name or service not known"), HostUnreachable,
         "the address of {b} cannot be found: Name or service not known"),
        (ConnectionResetError(104, "x"), HostUnreachable, "{b} closed the connection"),
        (OSError(113, "No route to host"), HostUnreachable, "{b} cannot be reached: No route to host"),
        (OSError("odd"), HostUnreachable, "{b} cannot be reached: odd"),
    ],
)  # fmt: skip
def test_every_error_is_a_sentence(error: OSError, kind: type[VmferryError], sentence: str) -> None:
    explained = tls.explain(error, "{b}")
    assert type(explained) is kind
    assert explained.message == sentence
    assert explained.cause is not None


@pytest.mark.parametrize("name", ["ca-cert.pem", "agent-cert.pem", "agent-key.pem"])
def test_files_that_are_missing_or_rubbish(tmp_path: Path, name: str) -> None:
    authority.init(tmp_path, {"host-a": []}, now=NOW)
    room = tmp_path / "host-a"
    (room / name).write_bytes(b"rubbish")
    with pytest.raises(NotTrusted, match="cannot be used"):
        tls.server_context(room)
    (room / name).unlink()
    with pytest.raises(NotTrusted, match=f"no certificate to show: .* lacks {name}$"):
        tls.client_context(room)
    (room / name).mkdir()
    with pytest.raises(NotTrusted, match=r"host-a cannot be (read|used)"):
        tls.client_context(room)


def test_a_key_of_another_certificate(tmp_path: Path) -> None:
    authority.init(tmp_path, {"host-a": [], "host-b": []}, now=NOW)
    (tmp_path / "host-b" / "agent-key.pem").rename(tmp_path / "host-a" / "agent-key.pem")
    with pytest.raises(NotTrusted, match="cannot be used: KEY_VALUES_MISMATCH"):
        tls.server_context(tmp_path / "host-a")


def test_tls_does_not_load_cryptography() -> None:
    check = "import sys, vmferry.pki.tls; sys.exit('cryptography' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
