"""What an image lies on, as a qemu-img says it; the answers are those of the real one."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from vmferry.agent import image_chain
from vmferry.errors import Unfit


def tool(folder: Path, answer: list[dict[str, Any]] | None) -> str:
    """A qemu-img beside a QEMU."""
    path = folder / "qemu-img"
    text = "#!/bin/sh\necho broken >&2\nexit 1\n" if answer is None else f"#!/bin/sh\ncat {folder}/answer\n"
    path.write_text(text)
    path.chmod(0o755)
    (folder / "answer").write_text(json.dumps(answer))
    return str(folder / "qemu-system-x86_64")


async def test_every_file_under_an_image_is_told(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("top.qcow2", "middle.qcow2", "base.raw", "middle.data")]
    for number, file in enumerate(files):
        file.write_bytes(bytes(number))
    top, middle, base, data = map(str, files)
    qemu = tool(
        tmp_path,
        [
            {"filename": top, "format": "qcow2", "full-backing-filename": middle},
            {
                "filename": middle,
                "format": "qcow2",
                "full-backing-filename": base,
                "format-specific": {"type": "qcow2", "data": {"data-file": "middle.data"}},
            },
            {"filename": base, "format": "raw"},
        ],
    )
    found = await image_chain.under(top, "qcow2", qemu=qemu)
    assert found is not None
    assert [(each.path, each.format, each.size_bytes) for each in found] == [
        (middle, "qcow2", 1), (data, "raw", 3), (base, "raw", 2),
    ]  # fmt: skip
    assert found[0].mtime_ns == files[1].stat().st_mtime_ns
    files[2].unlink()
    with pytest.raises(FileNotFoundError):
        await image_chain.under(top, "qcow2", qemu=qemu)


async def test_a_raw_image_lies_on_nothing_and_trouble_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qemu = tool(tmp_path, None)
    assert await image_chain.under("/a.raw", "raw", qemu=qemu) == ()
    with pytest.raises(Unfit, match="broken"):
        await image_chain.under("/a.qcow2", "qcow2", qemu=qemu)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert await image_chain.under("/a.qcow2", "qcow2", qemu="/nowhere/qemu") is None, "nobody knows"


def test_of_a_device_is_known_how_large_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "vg0-web1"
    path.write_bytes(bytes(1 << 20))
    found = image_chain.look(str(path))
    assert (found.size_bytes, found.mtime_ns, found.is_file) == (1 << 20, path.stat().st_mtime_ns, True)
    assert not image_chain.look("/dev/null").is_file
    real = os.stat

    def device(name: str) -> os.stat_result:
        """As the kernel tells of one: no size."""
        values = list(real(name))
        values[stat.ST_MODE], values[stat.ST_SIZE] = stat.S_IFBLK | 0o600, 0
        return os.stat_result(values, {"st_mtime_ns": 1})

    monkeypatch.setattr(os, "stat", device)
    found = image_chain.look(str(path))
    assert (found.size_bytes, found.is_file) == (1 << 20, False)

    def away(*arguments: Any) -> int:
        raise OSError(123, "No medium found")

    monkeypatch.setattr(os, "open", away)
    assert image_chain.look(str(path)).size_bytes == 0
