"""X.509 as vmferry uses it: ECDSA P-256 keys, one authority, leaves directly below it.

Theory of operation
-------------------
Two authorities use this module: the one of a set-up (`authority`) and the one of each job
(`job_credentials`). Both are the same shape, so the extensions are chosen once, here, to please OpenSSL (the
agents' side) and GnuTLS with QEMU's own extra checks (the migration stream's side).

Rule 1: this module imports `cryptography`, so callers import it late and the CLI's fast path never does.
Rule 2: nothing here reads the clock or a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

SERVER = ExtendedKeyUsageOID.SERVER_AUTH
CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH

COMMON_NAME_CHARACTERS_MAX = 64  # X.520's upper bound; OpenSSL refuses more


def make_key() -> ec.EllipticCurvePrivateKey:
    """A fresh P-256 key (about 0.02 ms)."""
    return ec.generate_private_key(ec.SECP256R1())


def make_authority(
    key: ec.EllipticCurvePrivateKey, common_name: str, *, not_before: datetime, not_after: datetime
) -> x509.Certificate:
    """A self-signed authority that may sign leaves and nothing deeper."""
    subject = _subject(common_name)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
    )
    return builder.sign(key, hashes.SHA256())


def make_leaf(
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    public_key: ec.EllipticCurvePublicKey,
    common_name: str,
    *,
    names: Sequence[x509.GeneralName],
    purposes: Sequence[x509.ObjectIdentifier],
    not_before: datetime,
    not_after: datetime,
) -> x509.Certificate:
    """A leaf of `authority` for `public_key` with these alternative names and purposes."""
    assert names, "a leaf without a name cannot be told from another"
    assert purposes, "a leaf without a purpose is refused by every peer"
    identifier = x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key())
    builder = (
        x509.CertificateBuilder()
        .subject_name(_subject(common_name))
        .issuer_name(authority.subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
    )
    return builder.sign(authority_key, hashes.SHA256())


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """The certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The private key as unencrypted PKCS#8 PEM: its file mode is its only guard."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def read_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """The P-256 key in `pem`. Raises ValueError for anything else."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except TypeError as error:  # what cryptography raises for a key under a pass phrase
        raise ValueError("the key is protected by a pass phrase") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("the key is not an elliptic-curve key")
    return key


def common_name(name: x509.Name) -> str:
    """The common name in `name`, or its whole text when it has none."""
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else name.rfc4514_string()


def is_authority(certificate: x509.Certificate) -> bool:
    """May this certificate sign others?"""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _subject(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:COMMON_NAME_CHARACTERS_MAX])])


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        # An ECDSA key enciphers nothing, but QEMU 7.2 refuses a leaf whose critical key usage lacks this.
        key_encipherment=not signs_certificates,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
