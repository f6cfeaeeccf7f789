"""`vmferry doctor` on hosts that are fit and on hosts that are not."""

from __future__ import annotations

from typing import Any

import pytest

from vmferry.testing.hosts import MakePair

pytestmark = pytest.mark.real


def named(wire: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in wire["checks"]}


def test_a_fit_host_point_by_point(make_pair: MakePair) -> None:
    """Whether KVM is of use depends on the machine that the tests run on; everything else has to be well."""
    pair = make_pair()
    done = pair.a.cli("doctor", "--json")
    wire = done.json
    assert set(wire) >= {"host", "fit", "checks"}
    checks = named(wire)
    wanted = {"qemu", "qemu-postcopy", "kvm", "userfaultfd", "memory", "state-directory", "ports", "certificates"}
    assert set(checks) >= wanted | {"agent of host-b"}
    assert [name for name, check in checks.items() if check["ok"] is False and name != "kvm"] == []
    assert all(check["fix"] for check in checks.values() if check["ok"] is False)
    assert "answers in" in checks["agent of host-b"]["detail"]
    assert done.code == (0 if wire["fit"] else 19)
    text = pair.a.cli("doctor")
    assert text.code == done.code
    assert text.out.startswith("ok  qemu")
    assert text.out.splitlines()[-1].startswith("host-a is ")


def test_what_is_wrong_is_named_with_its_fix(make_pair: MakePair) -> None:
    pair = make_pair(flags_a=["--qemu", "/nonexistent/qemu"])
    pair.b.kill()
    done = pair.a.cli("doctor", "--json")
    assert done.code == 19
    checks = named(done.json)
    assert done.json["fit"] is False
    assert checks["qemu"]["ok"] is False
    assert "/nonexistent/qemu" in checks["qemu"]["detail"]
    assert checks["agent of host-b"]["ok"] is False
    assert checks["agent of host-b"]["fix"]
    text = pair.a.cli("doctor").out
    assert "NO  agent of host-b" in text
    assert "fix: " in text
    pair.b.restart()
