"""The set-up's authority: nothing is overwritten, half-finished runs are finished, refusals are sentences."""

from __future__ import annotations

import os
import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from vmferry.errors import NotTrusted, Unfit, UsageError
from vmferry.pki import authority, certificates

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
HOSTS = {"host-a": ["10.0.0.1", "fe80::1", "a.example"], "host-b": ["10.0.0.2", "host-b", "10.0.0.2"]}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*.pem")}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def leaf(directory: Path, host: str = "host-a") -> x509.Certificate:
    return x509.load_pem_x509_certificate((directory / host / authority.AGENT_CERTIFICATE).read_bytes())


@pytest.fixture
def made(tmp_path: Path) -> Path:
    authority.init(tmp_path / "pki", HOSTS, now=NOW)
    return tmp_path / "pki"


def test_one_run_makes_everything(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "pki"
    report = authority.init(directory, HOSTS, now=NOW)
    assert report == authority.Report(directory, True, ("host-a", "host-b"), ())
    assert sorted(contents(directory)) == [
        "ca/ca-cert.pem", "ca/ca-key.pem",
        "host-a/agent-cert.pem", "host-a/agent-key.pem", "host-a/ca-cert.pem",
        "host-b/agent-cert.pem", "host-b/agent-key.pem", "host-b/ca-cert.pem",
    ]  # fmt: skip
    assert {mode(path) for path in (directory, directory / "ca", directory / "host-a")} == {0o700}
    assert {mode(path) for path in directory.rglob("*-key.pem")} == {0o600}
    assert not list(directory.rglob(".*"))


def test_a_certificate_names_its_agent_and_serves_both_ends(made: Path) -> None:
    certificate = leaf(made)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["vmferry://agent/host-a"]
    assert names.get_values_for_type(x509.DNSName) == ["host-a", "a.example"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1", "fe80::1"]
    purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(purposes) == {certificates.SERVER, certificates.CLIENT}
    assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)
    assert certificate.not_valid_before_utc == NOW - authority.SKEW
    assert certificate.not_valid_after_utc == NOW + timedelta(days=authority.AGENT_DAYS_DEFAULT)
    twice = leaf(made, "host-b").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert len(list(twice)) == 3, "a name given twice is in the certificate once"


def test_openssl_accepts_the_chain_at_its_strictest(made: Path) -> None:
    context = ssl.create_default_context(cafile=str(made / "ca" / "ca-cert.pem"))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_cert_chain(made / "host-a" / "agent-cert.pem", made / "host-a" / "agent-key.pem")


def test_running_again_keeps_what_is_and_adds_what_is_not(made: Path) -> None:
    before = contents(made)
    report = authority.init(made, {**HOSTS, "host-c": []}, now=NOW + timedelta(days=9))
    assert report == authority.Report(made, False, ("host-c",), ("host-a", "host-b"))
    after = contents(made)
    assert {name: after[name] for name in before} == before
    assert authority.describe(made / "host-c").chain_ok


@pytest.mark.parametrize("missing", ["agent-cert.pem", "ca-cert.pem"])
def test_a_half_finished_host_is_finished_with_its_own_key(made: Path, missing: str) -> None:
    before = contents(made)
    (made / "host-a" / missing).unlink()
    assert authority.init(made, HOSTS, now=NOW).made == ("host-a",)
    assert (made / "host-a" / "agent-key.pem").read_bytes() == before["host-a/agent-key.pem"]
    facts = authority.describe(made / "host-a")
    assert facts.key_matches
    assert facts.chain_ok


def test_a_half_finished_authority_is_finished_with_its_own_key(made: Path) -> None:
    key = (made / "ca" / "ca-key.pem").read_bytes()
    (made / "ca" / "ca-cert.pem").unlink()
    assert authority.init(made, HOSTS, now=NOW).authority_made
    assert (made / "ca" / "ca-key.pem").read_bytes() == key
    assert authority.describe(made / "host-a").chain_ok


def test_a_lost_key_is_not_made_again(made: Path) -> None:
    (made / "host-a" / "agent-key.pem").unlink()
    with pytest.raises(Unfit, match="host-a has a certificate but no key"):
        authority.init(made, HOSTS, now=NOW)


def test_a_certificate_of_another_authority_is_not_kept_silently(made: Path, tmp_path: Path) -> None:
    authority.init(tmp_path / "other", {"host-c": []}, now=NOW)
    (tmp_path / "other" / "host-c").rename(made / "host-c")
    with pytest.raises(NotTrusted, match="of another authority"):
        authority.init(made, {"host-c": []}, now=NOW)


def test_an_authority_that_is_over_signs_nothing(made: Path) -> None:
    late = NOW + timedelta(days=authority.AUTHORITY_DAYS + 1)
    with pytest.raises(NotTrusted, match="not valid now") as caught:
        authority.init(made, {"host-c": []}, now=late)
    assert "renew" in caught.value.hint
    assert not (made / "host-c").exists()


def test_no_certificate_outlives_its_authority(made: Path) -> None:
    late = NOW + timedelta(days=authority.AUTHORITY_DAYS - 10)
    authority.init(made, {"host-c": []}, now=late)
    assert leaf(made, "host-c").not_valid_after_utc == NOW + timedelta(days=authority.AUTHORITY_DAYS)


@pytest.mark.parametrize("host", ["", "ca", "-a", "a/b", "..", "a..b", "a b", "ä", "x" * 64, "a-"])
def test_a_name_that_cannot_be_used_is_refused_before_anything_is_written(tmp_path: Path, host: str) -> None:
    with pytest.raises(UsageError, match="cannot be a host's name"):
        authority.init(tmp_path / "pki", {"good": [], host: []}, now=NOW)
    assert not (tmp_path / "pki").exists()


@pytest.mark.parametrize("address", ["", "a b", "10.0.0.1/24", "x" * 254, "ä.example"])
def test_an_address_that_cannot_be_used_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(UsageError, match="neither an IP address nor a DNS name"):
        authority.init(tmp_path, {"host-a": [address]}, now=NOW)


@pytest.mark.parametrize("days", [0, -1, authority.DAYS_MAX + 1])
def test_a_span_that_cannot_be_used_is_refused(tmp_path: Path, days: int) -> None:
    with pytest.raises(UsageError, match="cannot last"):
        authority.init(tmp_path, HOSTS, days=days, now=NOW)
    with pytest.raises(UsageError, match="cannot last"):
        authority.renew(tmp_path, days=days, now=NOW)


def test_a_directory_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Unfit, match=r"certificates cannot be kept in .*: Not a directory"):
        authority.init(tmp_path / "file" / "pki", HOSTS, now=NOW)
    with pytest.raises(Unfit, match="certificates cannot be kept in"):
        authority.init(tmp_path / "file", HOSTS, now=NOW)


def test_a_failure_without_a_number_is_still_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("the moon is in the way")

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(Unfit, match="the moon"):
        authority.init(tmp_path / "pki", HOSTS, now=NOW)
    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(NotTrusted, match="the moon"):
        authority.describe(tmp_path)


def test_renew_gives_new_dates_to_the_same_keys_and_names(made: Path) -> None:
    before, old = contents(made), leaf(made)
    later = NOW + timedelta(days=700)
    report = authority.renew(made, ["host-a"], days=100, now=later)
    assert report == authority.Report(made, False, ("host-a",), ())
    after, new = contents(made), leaf(made)
    assert {name for name in before if before[name] != after[name]} == {"host-a/agent-cert.pem"}
    assert new.public_key() == old.public_key()
    assert new.not_valid_after_utc == later + timedelta(days=100)
    san = x509.SubjectAlternativeName
    assert new.extensions.get_extension_for_class(san) == old.extensions.get_extension_for_class(san)


def test_renew_renews_the_authority_when_it_must_and_old_and_new_trust_each_other(made: Path) -> None:
    later = NOW + timedelta(days=authority.AUTHORITY_DAYS - 30)
    old = {host: leaf(made, host) for host in HOSTS}
    old_authority = x509.load_pem_x509_certificate((made / "ca" / "ca-cert.pem").read_bytes())
    report = authority.renew(made, now=later)
    assert report.authority_made
    assert report.made == ("host-a", "host-b")
    new_authority = x509.load_pem_x509_certificate((made / "ca" / "ca-cert.pem").read_bytes())
    for host, certificate in old.items():
        certificate.verify_directly_issued_by(new_authority)
        leaf(made, host).verify_directly_issued_by(old_authority)
        facts = authority.describe(made / host)
        assert facts.chain_ok
        assert facts.authority_not_after > later + timedelta(days=3000)


def test_renew_of_what_is_not_there(made: Path, tmp_path: Path) -> None:
    before = contents(made)
    with pytest.raises(UsageError, match="no certificate of a host 'host-z'"):
        authority.renew(made, ["host-a", "host-z"], now=NOW)
    assert contents(made) == before
    with pytest.raises(NotTrusted, match=r"ca-cert\.pem cannot be read: No such file"):
        authority.renew(tmp_path / "nothing", now=NOW)


def test_renew_in_a_directory_that_cannot_be_written(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(made)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Unfit, match="No space left"):
        authority.renew(made, now=NOW)
    assert contents(made) == before


def test_renew_of_a_host_with_a_key_of_another_kind(made: Path) -> None:
    key = authority._read_key(made / "ca" / "ca-key.pem")
    parent = authority._read_certificate(made / "ca" / "ca-cert.pem")
    foreign = certificates.make_leaf(
        parent, key, ed25519.Ed25519PrivateKey.generate().public_key(), "host-a",  # type: ignore[arg-type]
        names=[x509.DNSName("host-a")], purposes=[certificates.SERVER],
        not_before=NOW, not_after=NOW + timedelta(days=1),
    )  # fmt: skip
    (made / "host-a" / "agent-cert.pem").write_bytes(certificates.certificate_pem(foreign))
    with pytest.raises(NotTrusted, match="not an elliptic-curve key"):
        authority.renew(made, ["host-a"], now=NOW)


def test_an_authority_whose_key_is_another_one(made: Path) -> None:
    (made / "ca" / "ca-key.pem").write_bytes(certificates.key_pem(certificates.make_key()))
    with pytest.raises(NotTrusted, match="does not belong"):
        authority.init(made, HOSTS, now=NOW)


def test_describe_a_good_host(made: Path) -> None:
    facts = authority.describe(made / "host-a")
    assert (facts.name, facts.addresses) == ("host-a", ("host-a", "10.0.0.1", "fe80::1", "a.example"))
    assert facts.issuer.startswith("vmferry authority ")
    assert authority.problems(facts, now=NOW) == ()


def test_describe_names_everything_that_is_wrong(made: Path, tmp_path: Path) -> None:
    authority.init(tmp_path / "other", {"host-a": []}, now=NOW)
    room = made / "host-a"
    for name in ("agent-key.pem", "ca-cert.pem"):
        (room / name).write_bytes((tmp_path / "other" / "host-a" / name).read_bytes())
    (room / "agent-key.pem").chmod(0o640)
    found = authority.problems(authority.describe(room), now=NOW + timedelta(days=5000))
    assert [text.split()[1] for text in found] == ["key", "key", "certificate", "certificate"]
    assert "ended at 2028-08-03 12:00 UTC" in found[-1]
    early = authority.problems(authority.describe(made / "host-b"), now=NOW - timedelta(days=5))
    assert early == ("the certificate starts only at 2026-04-30 12:00 UTC",)
    soon = authority.problems(authority.describe(made / "host-b"), now=NOW + timedelta(days=820))
    assert soon == ("the certificate ends in 5 days; 'vmferry pki renew' makes a new one",)


def test_describe_a_certificate_that_names_no_agent(made: Path) -> None:
    certificate = made / "ca" / "ca-cert.pem"  # has no alternative names at all
    (made / "host-a" / "agent-cert.pem").write_bytes(certificate.read_bytes())
    facts = authority.describe(made / "host-a")
    assert facts.name == ""
    assert authority.problems(facts, now=NOW)[0].startswith("the certificate does not name one agent")


def test_describe_an_authority_that_is_none(made: Path) -> None:
    room = made / "host-a"
    (room / "ca-cert.pem").write_bytes((room / "agent-cert.pem").read_bytes())
    assert not authority.describe(room).chain_ok


@pytest.mark.parametrize("name", ["ca-cert.pem", "agent-cert.pem", "agent-key.pem"])
def test_describe_files_that_are_missing_or_rubbish(made: Path, name: str) -> None:
    path = made / "host-a" / name
    path.write_bytes(b"rubbish")
    with pytest.raises(NotTrusted, match=f"{name} is not"):
        authority.describe(made / "host-a")
    path.unlink()
    with pytest.raises(NotTrusted, match=f"{name} cannot be read: No such file or directory"):
        authority.describe(made / "host-a")


def test_keys_that_vmferry_cannot_use() -> None:
    protected = certificates.make_key().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    with pytest.raises(ValueError, match="pass phrase"):
        certificates.read_key(protected)
    other = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with pytest.raises(ValueError, match="elliptic-curve"):
        certificates.read_key(other)


def test_small_helpers_on_certificates_of_others() -> None:
    assert certificates.common_name(x509.Name([])) == ""
    key = certificates.make_key()
    bare = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([]))
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    assert not certificates.is_authority(bare)
