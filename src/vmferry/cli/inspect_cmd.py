"""`vmferry inspect-stream`: says what a recorded migration stream holds, or how two of them differ."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from typing import Any

from vmferry.cli.render import table
from vmferry.errors import UsageError, VmferryError

SLAB_BYTES = 1 << 20


def inspect_stream(arguments: Namespace) -> int:
    """0: the stream is whole."""
    from vmferry.wire.summary import compare

    found = [_read(path) for path in (arguments.file, arguments.other) if path is not None]
    wire: dict[str, Any]
    if arguments.other is None:
        wire = {"file": arguments.file, **found[0][0].to_wire(), **found[0][1]}
    else:
        differences = list(compare(found[0][0], found[1][0]))
        wire = {"files": [arguments.file, arguments.other], "differences": differences}
    errors = [error for _, _, error in found if error is not None]
    if arguments.json:
        print(json.dumps({**wire, "error": errors[0].to_wire() if errors else None}))
    else:
        lines = _differences(wire["differences"]) if arguments.other else _summary(wire, fields=arguments.fields)
        # Names come from a stranger: bytes that are no text are shown as such.
        print("\n".join(lines).encode("utf-8", "backslashreplace").decode("utf-8"))
        for error in errors:
            sys.stderr.write(f"vmferry: {error.message}\n")
    return errors[0].exit_code if errors else 0


def _read(path: str) -> tuple[Any, dict[str, Any], VmferryError | None]:
    """The summary, how the file ended, and what was wrong with it."""
    from vmferry.wire.errors import WireError
    from vmferry.wire.events import DONE, NEED_DATA
    from vmferry.wire.stream import Settings, StreamDecoder
    from vmferry.wire.summary import Summary

    decoder = StreamDecoder(Settings(end="end-of-input", compress=True))
    summary = Summary()
    error: WireError | None = None
    size = 0
    try:
        with open(path, "rb") as file:
            while True:
                data = file.read(SLAB_BYTES)
                size += len(data)
                if data:
                    decoder.feed(data)
                else:
                    decoder.finish()
                while (event := decoder.next()) is not NEED_DATA and event is not DONE:
                    summary.add(event)
                if event is DONE:
                    size = file.seek(0, 2)
                    break
    except OSError as cause:
        raise UsageError(f"cannot read {path}: {cause.strerror}", cause=cause) from cause
    except WireError as wrong:
        error = wrong
    return summary, {"stream_bytes": decoder.offset, "file_bytes": size, "whole": error is None}, error


def _summary(wire: dict[str, Any], *, fields: bool) -> list[str]:
    lines = [f"machine       {wire['machine'] or '(no configuration section)'}"]
    if wire["capabilities"]:
        lines.append(f"capabilities  {', '.join(wire['capabilities'])}")
    if wire["uuid"]:
        lines.append(f"uuid          {wire['uuid']}")
    state = "whole" if wire["whole"] else "NOT whole"
    lines.append(f"stream        {wire['stream_bytes']} of {wire['file_bytes']} bytes, {state}")
    lines += [f"command       {each}" for each in wire["commands"]]
    lines += [f"iterable      {each}" for each in wire["iterable_sections"]]
    rows = [(each["name"], str(each["bytes"]), _records(each["records"])) for each in wire["blocks"]]
    lines += ["", *table(("BLOCK", "BYTES", "RECORDS"), rows)] if rows else []
    rows = [
        (f"{each['name']}/{each['instance']}", str(each["version"]), str(each["bytes"]))
        for each in wire["devices"]
    ]  # fmt: skip
    lines += ["", *table(("DEVICE", "VERSION", "BYTES"), rows)] if rows else []
    if wire["undelimited_device_bytes"]:
        lines.append(f"devices       {wire['undelimited_device_bytes']} bytes that nothing divides")
    for device in wire["devices"] if fields else []:
        lines += ["", f"{device['name']}/{device['instance']}"]
        lines += [f"  {each['path']:40} {each['type']:20} {each['hex']}" for each in device["fields"] or ()]
    return lines


def _records(records: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(records.items()))


def _differences(differences: list[dict[str, Any]]) -> list[str]:
    if not differences:
        return ["nothing differs but, perhaps, the contents of memory"]
    return [f"{each['what']}: {each['first']} -> {each['second']}" for each in differences]
