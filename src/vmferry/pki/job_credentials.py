"""Credentials that QEMU's own stream runs under: made for one job, on both hosts, and gone with it.

Theory of operation
-------------------
Each side makes an authority that signs exactly one leaf, and forgets the authority's key at once: nobody,
not even this host, can ever make a second certificate of it. Only the authority's certificate crosses to the
peer, over the agents' verified link. QEMU at the destination accepts the one client that the source's
authority signed, and QEMU at the source the one server that the destination's authority signed.

    make(...)            keys in memory, nothing in the file system
    .ca_pem_own          to the peer
    .accept_peer(pem)    DIRECTORY/ID/{ca-cert,server-cert,server-key}.pem   (client-… at the source)
    tls_creds_object     for object-add: QEMU reads the files then, and never again
    .remove()            deletes them; `remove_job` and `remove_left_overs` do so after a crash

Rule 1: a private key never leaves its host, and exists in a file only from `accept_peer` to `remove`.
Rule 2: ca-cert.pem holds the peer's authority and nothing else. QEMU's sanity check of our own leaf against
that file is therefore off: it would always fail, and the peer makes the real check.
Rule 3: the caller gives the time; certificates start early and end late enough for clocks that differ.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from vmferry.errors import NotTrusted, Unfit
from vmferry.pki import certificates, files

Role = Literal["source", "destination"]

SKEW = timedelta(days=2)
LIFETIME = timedelta(days=7)  # a recovery that comes later than this needs new credentials
CA_PEM_BYTES_MAX = 4096  # ours have about 650
_JOB_DIRECTORY = re.compile(r"job-[0-9a-f]{24}-(?:source|destination)")

# GnuTLS re-keys a TLS 1.3 session by itself after 2^24 records (QEMU makes two of each page, so after 32 GiB).
# That breaks a QEMU before 10.1, whose return path uses the session from another thread: gnutls issue 1717.
# TLS 1.2 is never re-keyed and just as fast; CHACHA20-POLY1305 in TLS 1.3 would do too, at half the speed.
# Each side chooses for its own QEMU: the two meet at 1.3 only where both may.
REKEY_SAFE_SINCE = (10, 1)
_CIPHERS = ":-KX-ALL:+ECDHE-ECDSA:-CIPHER-ALL:+AES-256-GCM:+AES-128-GCM:+CHACHA20-POLY1305"
PRIORITY_WITHOUT_REKEY = "NORMAL:-VERS-ALL:+VERS-TLS1.2" + _CIPHERS
PRIORITY_TLS_1_3 = "NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2" + _CIPHERS


@dataclass(slots=True)
class JobCredentials:
    """One side's credentials for one job. Owned by the job; not shared between threads."""

    job_id: str
    role: Role
    directory: Path
    ca_pem_own: bytes
    _files: dict[str, bytes] = field(repr=False)

    def accept_peer(self, ca_pem: bytes) -> None:
        """Trust the peer's job authority and write what QEMU reads into `directory` (0700).

        Raises NotTrusted when `ca_pem` is not one authority's certificate, and Unfit when the files cannot
        be written; then nothing is left behind and the guest is untouched.
        """
        _check_authority(ca_pem)
        remove_directory(self.directory)
        try:
            files.make_private_directory(self.directory)
            files.write_volatile(self.directory / "ca-cert.pem", ca_pem, mode=files.CERTIFICATE_MODE)
            for name, content in self._files.items():
                files.write_volatile(self.directory / name, content, mode=files.KEY_MODE)
        except OSError as error:
            self.remove()
            sentence = f"the job's credentials cannot be kept in {self.directory}: {error.strerror}"
            raise Unfit(sentence, cause=error) from error

    def remove(self) -> None:
        """Delete the files, if any. QEMU has read them already, so a running stream goes on."""
        remove_directory(self.directory)


def make(job_id: str, role: Role, directory: Path, *, now: datetime) -> JobCredentials:
    """Fresh keys and certificates for this side of the job, in memory (under 2 ms). Writes nothing."""
    not_before, not_after = now - SKEW, now + LIFETIME
    authority_key, leaf_key = certificates.make_key(), certificates.make_key()
    authority = certificates.make_authority(
        authority_key, f"vmferry job {tag(job_id)} {role}", not_before=not_before, not_after=not_after
    )
    leaf = certificates.make_leaf(
        authority,
        authority_key,
        leaf_key.public_key(),
        f"{role} of {tag(job_id)}",
        names=[x509.DNSName(tls_hostname(job_id) if role == "destination" else f"source.{tag(job_id)}")],
        purposes=[certificates.SERVER if role == "destination" else certificates.CLIENT],
        not_before=not_before,
        not_after=not_after,
    )
    endpoint = _endpoint(role)
    return JobCredentials(
        job_id,
        role,
        job_directory(job_id, role, directory),
        certificates.certificate_pem(authority),
        {
            f"{endpoint}-cert.pem": certificates.certificate_pem(leaf),
            f"{endpoint}-key.pem": certificates.key_pem(leaf_key),
        },
    )


def tls_creds_object(
    job_id: str, role: Role, directory: Path, *, priority: str = PRIORITY_WITHOUT_REKEY
) -> dict[str, Any]:
    """The arguments of QMP's object-add; its `id` is what the parameter tls-creds is set to.

    `priority` comes from `tls_priority` for this side's QEMU; the default is right for every version.
    """
    return {
        "qom-type": "tls-creds-x509",
        "id": f"vmferry-tls-{tag(job_id)}",
        "endpoint": _endpoint(role),
        "dir": str(job_directory(job_id, role, directory)),
        "verify-peer": True,
        "sanity-check": False,
        "priority": priority,
    }


def tls_priority(qemu_version: tuple[int, ...]) -> str:
    """What a QEMU of this version may use of TLS."""
    return PRIORITY_TLS_1_3 if qemu_version >= REKEY_SAFE_SINCE else PRIORITY_WITHOUT_REKEY


def tls_hostname(job_id: str) -> str:
    """What the source sets the parameter tls-hostname to: the name in the destination's leaf."""
    return f"destination.{tag(job_id)}"


def tag(job_id: str) -> str:
    """A short stand-in for the job's id that is plain in DNS names, QEMU ids and file names."""
    assert job_id, "a job has an id"
    return hashlib.sha256(job_id.encode()).hexdigest()[:24]


def job_directory(job_id: str, role: Role, directory: Path) -> Path:
    """Where this side of the job keeps its files below `directory`."""
    return directory / f"job-{tag(job_id)}-{role}"


def remove_job(job_id: str, directory: Path) -> None:
    """Delete whatever both roles of the job left below `directory`; nothing there is fine."""
    remove_directory(job_directory(job_id, "source", directory))
    remove_directory(job_directory(job_id, "destination", directory))


def remove_left_overs(directory: Path, *, keep: Collection[str]) -> tuple[Path, ...]:
    """Delete the credentials of every job but those with the ids in `keep`; returns what was deleted."""
    kept = {job_directory(job_id, role, directory) for job_id in keep for role in _ROLES}
    found = sorted(directory.iterdir()) if directory.is_dir() else []
    doomed = [path for path in found if _JOB_DIRECTORY.fullmatch(path.name) and path not in kept]
    for path in doomed:
        remove_directory(path)
    return tuple(doomed)


def remove_directory(path: Path) -> None:
    """Delete the directory and all in it. Raises OSError for a reason other than that it is gone."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return


_ROLES: tuple[Role, Role] = ("source", "destination")


def _endpoint(role: Role) -> str:
    return "server" if role == "destination" else "client"


def _check_authority(ca_pem: bytes) -> None:
    if len(ca_pem) > CA_PEM_BYTES_MAX:
        raise NotTrusted("the peer sent more than a certificate as its job authority", side="both")
    try:
        found = x509.load_pem_x509_certificates(ca_pem)
        plain = len(found) == 1 and isinstance(found[0].public_key(), ec.EllipticCurvePublicKey)
        authority = plain and certificates.is_authority(found[0])
    except ValueError as error:
        raise NotTrusted("the peer sent no certificate as its job authority", cause=error) from error
    if not authority:
        raise NotTrusted("the peer sent something else than one authority as its job authority")
