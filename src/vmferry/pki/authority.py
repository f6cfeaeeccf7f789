"""The set-up's own authority: one command makes it and the certificates of every host.

Theory of operation
-------------------
`init` fills a directory that a person then copies out, one sub-directory per host:

    DIRECTORY/ca/ca-cert.pem  ca-key.pem             stays where it is; only needed to add or renew
    DIRECTORY/HOST/ca-cert.pem  agent-cert.pem  agent-key.pem    goes to HOST, as the agent's --pki

An agent is known by the name in its certificate (`vmferry://agent/HOST`), not by the address it was reached
at, so a host may move; names and addresses are in the certificate for other tools.

Rule 1: a key is written once and never replaced. Running again adds what is missing and keeps the rest.
Rule 2: a key is written before its certificate, so a run that died half-way is finished by the next run.
Rule 3: the caller gives the time. Nothing here touches a guest.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec

from vmferry.errors import NotTrusted, Unfit, UsageError
from vmferry.pki import certificates, files

AUTHORITY_DIRECTORY = "ca"
AUTHORITY_CERTIFICATE = "ca-cert.pem"
AUTHORITY_KEY = "ca-key.pem"
AGENT_CERTIFICATE = "agent-cert.pem"
AGENT_KEY = "agent-key.pem"
AGENT_URI = "vmferry://agent/"

AGENT_DAYS_DEFAULT = 825
AUTHORITY_DAYS = 3650
SKEW = timedelta(days=1)  # certificates start this much early: hosts' clocks differ
DAYS_MAX = 36500
PEM_BYTES_MAX = 64 * 1024

# A host name becomes a directory, a URI path and a DNS label, so it must be plain in all three.
_HOST_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,61}[A-Za-z0-9])?")
_DNS_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")


@dataclass(frozen=True, slots=True)
class Report:
    """What `init` or `renew` did: was the authority made, and which hosts' certificates are new or kept."""

    directory: Path
    authority_made: bool
    made: tuple[str, ...]
    kept: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """What is true of one host's certificate files; times are UTC."""

    name: str
    issuer: str
    addresses: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    authority_not_after: datetime
    key_matches: bool
    key_private: bool
    chain_ok: bool


@dataclass(frozen=True, slots=True)
class _Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def init(
    directory: Path,
    hosts: Mapping[str, Sequence[str]],
    *,
    days: int = AGENT_DAYS_DEFAULT,
    now: datetime,
) -> Report:
    """Make the authority if there is none, and a key and certificate for each of `hosts` that has none.

    `hosts` maps each host's name to its IP addresses and DNS names. Certificates last `days` days, never
    longer than the authority's. Raises UsageError for a name, address or number that cannot be used,
    before anything is written; Unfit when the directory cannot be used; NotTrusted when the authority in it
    is broken. What was already made stays and stays valid; no guest is touched.
    """
    _check_days(days)
    names = {host: _alternative_names(host, addresses) for host, addresses in hosts.items()}
    made: list[str] = []
    kept: list[str] = []
    try:
        if not directory.exists():
            files.make_private_directory(directory)
        authority, authority_made = _ensure_authority(directory / AUTHORITY_DIRECTORY, now)
        for host in sorted(names):
            room = directory / host
            if _ensure_host(room, host, names[host], authority, days=days, now=now):
                made.append(host)
            else:
                kept.append(host)
    except OSError as error:
        raise _unfit(directory, error) from error
    return Report(directory, authority_made, tuple(made), tuple(kept))


def renew(
    directory: Path,
    hosts: Sequence[str] | None = None,
    *,
    days: int = AGENT_DAYS_DEFAULT,
    now: datetime,
) -> Report:
    """Give `hosts` (default: every host there) certificates with new dates for the same keys and names.

    The authority's certificate is renewed too, for its same key, when it would end before they do: agents
    with the old one and agents with the new one still trust each other until the old one ends. Raises
    UsageError for a host that is not there; Unfit and NotTrusted as `init`. What was not renewed stays.
    """
    _check_days(days)
    try:
        authority = _read_authority(directory / AUTHORITY_DIRECTORY)
        chosen = sorted(_hosts_in(directory) if hosts is None else set(hosts))
        old = {host: _read_leaf(directory, host) for host in chosen}
        renewed_authority = _utc_after(authority.certificate) < now + timedelta(days=days)
        if renewed_authority:
            authority = _renew_authority(directory / AUTHORITY_DIRECTORY, authority, days=days, now=now)
        pem = certificates.certificate_pem(authority.certificate)
        for host, leaf in old.items():
            room, names = directory / host, list(_san(leaf))
            _issue(room, host, names, authority, leaf_key=leaf.public_key(), days=days, now=now)
            files.replace(room / AUTHORITY_CERTIFICATE, pem, mode=files.CERTIFICATE_MODE)
    except OSError as error:
        raise _unfit(directory, error) from error
    return Report(directory, renewed_authority, tuple(chosen), ())


def describe(directory: Path) -> CertificateFacts:
    """The facts about one host's files in `directory`. Raises NotTrusted when one is missing."""
    authority = _read_certificate(directory / AUTHORITY_CERTIFICATE)
    leaf = _read_certificate(directory / AGENT_CERTIFICATE)
    key = _read_key(directory / AGENT_KEY)
    names = tuple(_san(leaf))
    uris = [name.value for name in names if isinstance(name, x509.UniformResourceIdentifier)]
    agents = [uri.removeprefix(AGENT_URI) for uri in uris if uri.startswith(AGENT_URI)]
    addresses = [str(name.value) for name in names if isinstance(name, x509.IPAddress | x509.DNSName)]
    return CertificateFacts(
        name=agents[0] if len(agents) == 1 else "",
        issuer=certificates.common_name(leaf.issuer),
        addresses=tuple(addresses),
        not_before=leaf.not_valid_before_utc,
        not_after=_utc_after(leaf),
        authority_not_after=_utc_after(authority),
        key_matches=key.public_key() == leaf.public_key(),
        key_private=not (directory / AGENT_KEY).stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO),
        chain_ok=certificates.is_authority(authority) and _is_issued_by(leaf, authority),
    )


def problems(facts: CertificateFacts, *, now: datetime, warn_days: int = 30) -> tuple[str, ...]:
    """One sentence for each thing in `facts` that a person should mend; empty when all is well."""
    found: list[str] = []
    if not facts.name:
        found.append(f"the certificate does not name one agent ({AGENT_URI}NAME)")
    if not facts.key_matches:
        found.append("the key does not belong to the certificate")
    if not facts.key_private:
        found.append("the key can be read by other users")
    if not facts.chain_ok:
        found.append(f"the certificate is not signed by {AUTHORITY_CERTIFICATE} beside it")
    if now < facts.not_before:
        found.append(f"the certificate starts only at {facts.not_before:%Y-%m-%d %H:%M} UTC")
    end = min(facts.not_after, facts.authority_not_after)
    if now >= end:
        found.append(f"the certificate ended at {end:%Y-%m-%d %H:%M} UTC")
    elif now + timedelta(days=warn_days) >= end:
        found.append(f"the certificate ends in {(end - now).days} days; 'vmferry pki renew' makes a new one")
    return tuple(found)


def _check_days(days: int) -> None:
    if not 1 <= days <= DAYS_MAX:
        raise UsageError(f"a certificate cannot last {days} days; give 1 to {DAYS_MAX}")


def _alternative_names(host: str, addresses: Sequence[str]) -> list[x509.GeneralName]:
    if _HOST_NAME.fullmatch(host) is None or ".." in host or host == AUTHORITY_DIRECTORY:
        raise UsageError(f"{host!r} cannot be a host's name; use letters, digits, '-' and '.', and not 'ca'")
    names: list[x509.GeneralName] = [
        x509.UniformResourceIdentifier(AGENT_URI + host),
        x509.DNSName(host),
    ]
    for address in dict.fromkeys(addresses):
        name = _general_name(host, address)
        if name not in names:
            names.append(name)
    return names


def _general_name(host: str, address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        if _DNS_NAME.fullmatch(address) is None:
            raise UsageError(f"{address!r} of host {host} is neither an IP address nor a DNS name") from None
        return x509.DNSName(address)


def _ensure_authority(room: Path, now: datetime) -> tuple[_Authority, bool]:
    if (room / AUTHORITY_CERTIFICATE).exists():
        authority = _read_authority(room)
        if not authority.certificate.not_valid_before_utc <= now < _utc_after(authority.certificate):
            raise NotTrusted(
                f"the authority in {room} is not valid now; it ends at {_utc_after(authority.certificate)}",
                side="client",
                hint="renew it with 'vmferry pki renew'",
            )
        return authority, False
    files.make_private_directory(room)
    key = _ensure_key(room / AUTHORITY_KEY)
    # The name carries a serial so that two set-ups' authorities are never taken for one another.
    serial = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest.hex()[:8]
    end = now + timedelta(days=AUTHORITY_DAYS)
    certificate = certificates.make_authority(key, f"vmferry authority {serial}", not_before=now - SKEW, not_after=end)
    pem = certificates.certificate_pem(certificate)
    files.write_new(room / AUTHORITY_CERTIFICATE, pem, mode=files.CERTIFICATE_MODE)
    return _Authority(certificate, key), True


def _renew_authority(room: Path, old: _Authority, *, days: int, now: datetime) -> _Authority:
    certificate = certificates.make_authority(
        old.key,
        certificates.common_name(old.certificate.subject),
        not_before=now - SKEW,
        not_after=now + timedelta(days=max(days, AUTHORITY_DAYS)),
    )
    pem = certificates.certificate_pem(certificate)
    files.replace(room / AUTHORITY_CERTIFICATE, pem, mode=files.CERTIFICATE_MODE)
    return _Authority(certificate, old.key)


def _ensure_host(
    room: Path, host: str, names: list[x509.GeneralName], authority: _Authority, *, days: int, now: datetime
) -> bool:
    """Finish what is missing in the host's room; was anything?"""
    has_certificate = (room / AGENT_CERTIFICATE).exists()
    if has_certificate and not (room / AGENT_KEY).exists():
        raise Unfit(
            f"{room} has a certificate but no key, and a lost key cannot be made again",
            hint=f"move {room} away and run the command again: {host} gets a new key",
        )
    if has_certificate and not _is_issued_by(_read_certificate(room / AGENT_CERTIFICATE), authority.certificate):
        raise NotTrusted(
            f"the certificate in {room} is of another authority than {room.parent / AUTHORITY_DIRECTORY}",
            side="client",
            hint=f"move {room} away and run the command again",
        )
    if has_certificate and (room / AUTHORITY_CERTIFICATE).exists():
        return False
    files.make_private_directory(room)
    key = _ensure_key(room / AGENT_KEY)
    if not has_certificate:
        _issue(room, host, names, authority, leaf_key=key.public_key(), days=days, now=now)
    pem = certificates.certificate_pem(authority.certificate)
    files.replace(room / AUTHORITY_CERTIFICATE, pem, mode=files.CERTIFICATE_MODE)
    return True


def _ensure_key(path: Path) -> ec.EllipticCurvePrivateKey:
    if path.exists():
        return _read_key(path)
    key = certificates.make_key()
    files.write_new(path, certificates.key_pem(key), mode=files.KEY_MODE)
    return key


def _issue(
    room: Path,
    host: str,
    names: list[x509.GeneralName],
    authority: _Authority,
    *,
    leaf_key: object,
    days: int,
    now: datetime,
) -> None:
    if not isinstance(leaf_key, ec.EllipticCurvePublicKey):
        raise NotTrusted(f"the key of {room} is not an elliptic-curve key", side="client")
    leaf = certificates.make_leaf(
        authority.certificate,
        authority.key,
        leaf_key,
        host,
        names=names,
        purposes=(certificates.SERVER, certificates.CLIENT),
        not_before=now - SKEW,
        not_after=min(now + timedelta(days=days), _utc_after(authority.certificate)),
    )
    pem = certificates.certificate_pem(leaf)
    files.replace(room / AGENT_CERTIFICATE, pem, mode=files.CERTIFICATE_MODE)


def _hosts_in(directory: Path) -> list[str]:
    return [room.name for room in directory.iterdir() if (room / AGENT_CERTIFICATE).exists()]


def _read_authority(room: Path) -> _Authority:
    authority = _Authority(_read_certificate(room / AUTHORITY_CERTIFICATE), _read_key(room / AUTHORITY_KEY))
    if authority.key.public_key() != authority.certificate.public_key():
        raise NotTrusted(f"the key in {room} does not belong to the certificate beside it", side="client")
    return authority


def _read_leaf(directory: Path, host: str) -> x509.Certificate:
    if not (directory / host / AGENT_CERTIFICATE).exists():
        raise UsageError(f"{directory} has no certificate of a host {host!r}")
    return _read_certificate(directory / host / AGENT_CERTIFICATE)


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except ValueError as error:
        raise NotTrusted(f"{path} is not a certificate", side="client", cause=error) from error


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        return certificates.read_key(_read(path))
    except ValueError as error:
        sentence = f"{path} is not a private key that vmferry can use"
        raise NotTrusted(sentence, side="client", cause=error) from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(PEM_BYTES_MAX)
    except OSError as error:
        text = os.strerror(error.errno) if error.errno else str(error)
        raise NotTrusted(f"{path} cannot be read: {text}", side="client", cause=error) from error


def _san(leaf: x509.Certificate) -> tuple[x509.GeneralName, ...]:
    try:
        return tuple(leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return ()


def _is_issued_by(leaf: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        leaf.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _utc_after(certificate: x509.Certificate) -> datetime:
    end = certificate.not_valid_after_utc
    assert end.tzinfo is UTC
    return end


def _unfit(directory: Path, error: OSError) -> Unfit:
    text = os.strerror(error.errno) if error.errno else str(error)
    return Unfit(f"certificates cannot be kept in {directory}: {text}", cause=error)
