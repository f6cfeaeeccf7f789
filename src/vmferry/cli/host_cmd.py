"""`vmferry doctor`, `options`, `exit-codes`, `pki`."""

from __future__ import annotations

import json
from argparse import Namespace
from datetime import UTC, datetime
from pathlib import Path

from vmferry.cli import client as agent_client
from vmferry.cli.render import table
from vmferry.clock import SystemClock
from vmferry.core.options import help_lines
from vmferry.errors import ERROR_CLASSES, Unfit, UsageError


def doctor(arguments: Namespace) -> int:
    """0: this host is fit."""
    wire = agent_client.once(arguments.socket, "doctor")
    code = 0 if wire["fit"] else Unfit.exit_code
    if arguments.json:
        print(json.dumps(wire))
        return code
    marks = {True: "ok", False: "NO", None: "?"}
    for check in wire["checks"]:
        print(f"{marks[check['ok']]:3} {check['name']:20} {check['detail']}")
        if check["fix"] and check["ok"] is not True:
            print(f"    fix: {check['fix']}")
    print(f"{wire['host']} is fit" if wire["fit"] else f"{wire['host']} is not fit; see NO above")
    return code


def options(arguments: Namespace) -> int:
    """Every option that a person may set."""
    lines = help_lines()
    print(json.dumps({"options": list(lines)}) if arguments.json else "\n".join(lines))
    return 0


def exit_codes(arguments: Namespace) -> int:
    """Exit codes from the error classes themselves."""
    rows = [(0, "ok", "What was asked for is so.")]
    rows += [(cls.exit_code, cls.code, (cls.__doc__ or "").strip()) for cls in ERROR_CLASSES]
    rows.sort()
    if arguments.json:
        print(json.dumps({"exit_codes": [{"exit_code": n, "code": c, "meaning": m} for n, c, m in rows]}))
        return 0
    for line in table(("CODE", "NAME", "MEANING"), [(str(n), c, m) for n, c, m in rows]):
        print(line)
    return 0


def pki(arguments: Namespace) -> int:
    """Makes or renews certificates."""
    from vmferry.pki import authority

    hosts: dict[str, list[str]] = {}
    for text in arguments.hosts:
        name, equals, addresses = text.partition("=")
        if not name or (not addresses.strip(",") and (equals or not arguments.renew)):
            raise UsageError(f"{text!r} is not a host; write HOST=ADDRESS, for example host-a=10.0.0.1")
        hosts[name] = [a for a in addresses.split(",") if a]
    directory = Path(arguments.directory)
    now = datetime.fromtimestamp(SystemClock().wall_s(), UTC)
    more = {} if arguments.days is None else {"days": arguments.days}
    if arguments.renew:
        report = authority.renew(directory, list(hosts) or None, now=now, **more)
    else:
        if not hosts:
            raise UsageError("name the hosts: vmferry pki DIR host-a=10.0.0.1 host-b=10.0.0.2")
        report = authority.init(directory, hosts, now=now, **more)
    wire = {
        "directory": str(report.directory),
        "authority_made": report.authority_made,
        "made": list(report.made),
        "kept": list(report.kept),
    }
    if arguments.json:
        print(json.dumps(wire))
        return 0
    for name in report.made:
        print(f"{directory / name}: copy to {name}, and start its agent with --pki DIR")
    for name in report.kept:
        print(f"{directory / name}: kept as it was")
    return 0
