"""TLS between agents: TLS 1.3 only, both sides verified, and the peer known by the name in its certificate.

Theory of operation
-------------------
Both sides present a certificate of the set-up's authority. The address that an agent was reached at proves
nothing, so the host-name check is off; in its place `check_peer` demands the agent's name
(`vmferry://agent/HOST`) that the caller meant to reach. A peer may thus be dialled at any of its addresses.

In TLS 1.3 a client has finished its handshake before the server has looked at the client's certificate: a
refusal arrives with the first read. So callers put the first exchange inside the same `try` as the
handshake, and hand every OSError to `explain`.

Rule 1: stdlib only. `cryptography` is never imported from here.
Rule 2: `check_peer` is called before the first byte of a peer is believed.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmferry.errors import HostUnreachable, NotTrusted, VmferryError

# The same names as in `authority`, which is not imported here because it brings `cryptography` along.
_AUTHORITY_CERTIFICATE = "ca-cert.pem"
_AGENT_CERTIFICATE = "agent-cert.pem"
_AGENT_KEY = "agent-key.pem"
_AGENT_URI = "vmferry://agent/"


Connection = ssl.SSLSocket | ssl.SSLObject  # asyncio gives the second as "ssl_object"


def server_context(directory: Path) -> ssl.SSLContext:
    """The context that an agent listens with; `directory` holds its three files. Raises NotTrusted.

    Files are read now: after a renewal, make a new context.
    """
    return _context(ssl.PROTOCOL_TLS_SERVER, directory)


def client_context(directory: Path) -> ssl.SSLContext:
    """The context that an agent dials with; `directory` holds its three files. Raises NotTrusted."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, directory)


def _context(protocol: int, directory: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    # Sessions are never resumed: each connection shows its certificate, so a renewal or a removal counts now.
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    try:
        context.load_verify_locations(cafile=directory / _AUTHORITY_CERTIFICATE)
        context.load_cert_chain(directory / _AGENT_CERTIFICATE, directory / _AGENT_KEY)
    except FileNotFoundError as error:
        names = (_AUTHORITY_CERTIFICATE, _AGENT_CERTIFICATE, _AGENT_KEY)
        missing = ", ".join(name for name in names if not (directory / name).exists())
        raise NotTrusted(
            f"this agent has no certificate to show: {directory} lacks {missing}", side="client", cause=error
        ) from error
    except ssl.SSLError as error:
        sentence = f"the certificate files in {directory} cannot be used: {_reason(error)}"
        raise NotTrusted(sentence, side="client", cause=error) from error
    except OSError as error:
        sentence = f"the certificate files in {directory} cannot be read: {error.strerror}"
        raise NotTrusted(sentence, side="client", cause=error) from error
    return context


def peer_name(connection: Connection) -> str:
    """The agent's name in the peer's certificate, after the handshake. Raises NotTrusted."""
    return name_in(connection.getpeercert() or {})


def name_in(certificate: Mapping[str, Any]) -> str:
    """The agent's name in a certificate as `getpeercert` gives it. Raises NotTrusted."""
    uris = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"]
    names = [uri.removeprefix(_AGENT_URI) for uri in uris if uri.startswith(_AGENT_URI)]
    if len(names) != 1 or not names[0]:
        raise NotTrusted("the peer's certificate does not name one agent, so nobody knows who it is")
    return str(names[0])


def check_peer(connection: Connection, expected: str) -> None:
    """Raise NotTrusted unless the peer is the agent named `expected`; the caller then closes."""
    found = peer_name(connection)
    if found != expected:
        raise NotTrusted(f"the agent that answers for {expected} shows the certificate of {found}")


# X509_V_ERR_*: what this side found wrong with the peer's certificate.
_VERIFY_SENTENCES = {
    9: "the certificate of {peer} is not valid yet; compare the clocks of both hosts",
    10: "the certificate of {peer} has expired; 'vmferry pki renew' makes a new one",
    18: "{peer} shows a certificate that no authority has signed",
    19: "the certificate of {peer} is signed by an authority that this host does not know",
    20: "the certificate of {peer} is signed by an authority that this host does not know",
    7: "the certificate of {peer} is signed by an authority that this host does not know",
    21: "the certificate of {peer} is signed by an authority that this host does not know",
    26: "the certificate of {peer} was not made for an agent",
}
# Alerts: what the peer found wrong with ours.
_ALERT_SENTENCES = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "{peer} demands a certificate and this side showed none",
    "TLSV1_ALERT_UNKNOWN_CA": "{peer} does not know the authority that signed this host's certificate",
    "TLSV1_ALERT_DECRYPT_ERROR": "{peer} does not know the authority that signed this host's certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "{peer} says that this host's certificate has expired",
    "SSLV3_ALERT_BAD_CERTIFICATE": "{peer} does not accept this host's certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "{peer} does not accept this host's certificate",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "{peer} does not accept this host's certificate",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "{peer} does not accept this host's way of TLS",
    "TLSV1_ALERT_PROTOCOL_VERSION": "{peer} does not speak TLS 1.3",
    "UNSUPPORTED_PROTOCOL": "{peer} does not speak TLS 1.3",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "{peer} showed no certificate",
    "WRONG_VERSION_NUMBER": "{peer} does not speak TLS; is another program at that address?",
    "PACKET_LENGTH_TOO_LONG": "{peer} does not speak TLS; is another program at that address?",
    "RECORD_LAYER_FAILURE": "{peer} does not speak TLS; is another program at that address?",
    "HTTP_REQUEST": "{peer} does not speak TLS; is another program at that address?",
    "HTTPS_PROXY_REQUEST": "{peer} does not speak TLS; is another program at that address?",
}


def explain(error: OSError, peer: str) -> VmferryError:
    """The NotTrusted or HostUnreachable, in one sentence about `peer`, that a failed connection means."""
    match error:
        case ssl.SSLCertVerificationError():
            sentence = _VERIFY_SENTENCES.get(error.verify_code)
            if sentence is not None:
                return NotTrusted(sentence.format(peer=peer), cause=error)
            return NotTrusted(f"the certificate of {peer} cannot be trusted ({error.verify_message})", cause=error)
        case ssl.SSLEOFError() | ssl.SSLZeroReturnError():
            return HostUnreachable(f"{peer} closed the connection in the middle of the greeting", cause=error)
        case ssl.SSLError():
            known = _ALERT_SENTENCES.get(_reason(error))
            if known is not None:
                return NotTrusted(known.format(peer=peer), cause=error)
            return NotTrusted(f"{peer} and this host cannot agree on TLS: {_reason(error)}", cause=error)
        case ConnectionRefusedError():
            return HostUnreachable(f"no agent listens at the address of {peer}", cause=error)
        case TimeoutError():
            return HostUnreachable(f"{peer} did not answer in time", cause=error)
        case socket.gaierror():
            return HostUnreachable(f"the address of {peer} cannot be found: {error.strerror}", cause=error)
        case ConnectionError():
            return HostUnreachable(f"{peer} closed the connection", cause=error)
        case _:
            return HostUnreachable(f"{peer} cannot be reached: {error.strerror or error}", cause=error)


def _reason(error: ssl.SSLError) -> str:
    # The attribute is absent when it was not OpenSSL but asyncio that made the error.
    return str(getattr(error, "reason", None) or error.strerror or error)
