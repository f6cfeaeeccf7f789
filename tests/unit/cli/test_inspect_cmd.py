"""`vmferry inspect-stream`, on small streams in files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.wire_streams import bitmaps, device, join, opening, postcopy, precopy
from vmferry.cli.main import main
from vmferry.errors import RemoteProtocolError, UsageError


@pytest.fixture
def stream(tmp_path: Path) -> str:
    path = tmp_path / "stream"
    path.write_bytes(join(precopy()))
    return str(path)


def test_a_whole_stream(stream: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect-stream", stream]) == 0
    out = capsys.readouterr().out
    assert "pc-i440fx-11.1" in out
    assert "pc.ram  262144  22 page, 1 xbzrle, 20 zero" in out
    assert "timer/0  1        24" in out
    assert main(["inspect-stream", stream, "--fields"]) == 0
    assert "state" in capsys.readouterr().out


def test_json_has_the_fields_of_devices(stream: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect-stream", stream, "--json"]) == 0
    wire = json.loads(capsys.readouterr().out)
    assert wire["whole"] is True
    assert wire["error"] is None
    assert wire["stream_bytes"] == wire["file_bytes"] == len(join(precopy()))
    dma = next(each for each in wire["devices"] if each["name"] == "dma")
    assert dma["instance"] == 1
    assert dma["fields"] == [{"path": "state", "type": "buffer", "bytes": 75, "hex": "09" * 32 + "..."}]


def test_what_follows_the_stream_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "stream"
    path.write_bytes(join(precopy()) + b"more")
    assert main(["inspect-stream", str(path), "--json"]) == 0
    wire = json.loads(capsys.readouterr().out)
    assert wire["file_bytes"] - wire["stream_bytes"] == 4


def test_a_cut_stream_shows_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "stream"
    path.write_bytes(join(precopy())[:50_000])
    assert main(["inspect-stream", str(path)]) == RemoteProtocolError.exit_code
    captured = capsys.readouterr()
    assert "NOT whole" in captured.out
    assert "ends in the middle" in captured.err
    assert main(["inspect-stream", str(path), "--json"]) == RemoteProtocolError.exit_code
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "protocol"


def test_postcopy_and_bitmaps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "stream"
    path.write_bytes(postcopy())
    assert main(["inspect-stream", str(path)]) == 0
    out = capsys.readouterr().out
    assert "Discard pc.ram: 2 ranges, 36864 bytes" in out
    assert "Packaged" in out
    path.write_bytes(join([*opening(), *bitmaps()]))
    assert main(["inspect-stream", str(path)]) == RemoteProtocolError.exit_code
    assert "iterable      dirty-bitmap" in capsys.readouterr().out


def test_a_stream_without_anything_optional(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "stream"
    events = [
        each for each in precopy(description=False) if type(each).__name__ not in ("Configuration", "SectionFooter")
    ]
    path.write_bytes(join(events))
    assert main(["inspect-stream", str(path)]) == 0
    out = capsys.readouterr().out
    assert "(no configuration section)" in out
    assert "that nothing divides" in out


def test_differences(stream: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.write_bytes(join(precopy()).replace(b"\x09" * 75, b"\x02" * 75).replace(b"pc-i440fx-11.1", b"pc-i440fx-10.2"))
    assert main(["inspect-stream", stream, stream]) == 0
    assert "nothing differs" in capsys.readouterr().out
    assert main(["inspect-stream", stream, str(other), "--json"]) == 0
    what = [each["what"] for each in json.loads(capsys.readouterr().out)["differences"]]
    assert what == ["machine", "device dma/1, state"]
    assert main(["inspect-stream", stream, str(other)]) == 0
    assert "machine: pc-i440fx-11.1 -> pc-i440fx-10.2" in capsys.readouterr().out


def test_devices_that_only_one_has(stream: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    events = precopy(description=False)
    other.write_bytes(join([*events[:-1], *device(40, "hpet", bytes(5)), events[-1]]))
    assert main(["inspect-stream", stream, str(other)]) == 0
    assert capsys.readouterr().out == "device hpet/0: None -> there\n"
    other.write_bytes(join(precopy(description=False)).replace(b"\x09" * 75, b"\x02" * 75))
    assert main(["inspect-stream", stream, str(other)]) == 0
    assert "device dma/1, state: 0909" in capsys.readouterr().out


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert main(["inspect-stream", str(tmp_path / "missing")]) == UsageError.exit_code
