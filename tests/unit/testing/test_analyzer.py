"""What is fetched for a test is what it was when its checksum was written down, or it is not used."""

from __future__ import annotations

import io
import tarfile
import urllib.request
from pathlib import Path

import pytest

from vmferry.testing import analyzer
from vmferry.testing.host_tools import HostToolError

SCRIPT = b"print('QEMU')\n"


def archive(name: str = analyzer.MEMBER, script: bytes = SCRIPT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:xz") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(script)
        tar.addfile(member, io.BytesIO(script))
    return out.getvalue()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What the mirror answers, once each; none is left when it was asked."""
    answers: list[bytes] = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        assert url == analyzer.SOURCE
        if not answers:
            raise OSError("no route to the mirror")
        return io.BytesIO(answers.pop())

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(analyzer, "SCRIPT_SHA256", analyzer._digest(SCRIPT))
    return answers


def test_it_is_fetched_once_and_looked_at_each_time(
    tmp_path: Path, served: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = archive()
    monkeypatch.setattr(analyzer, "SOURCE_SHA256", analyzer._digest(data))
    served += [data, data]
    path = analyzer.fetch(tmp_path)
    assert path.read_bytes() == SCRIPT
    assert analyzer.fetch(tmp_path) == path
    assert len(served) == 1, "the second one asked nobody"
    path.write_bytes(b"import os\n")
    assert not analyzer.is_there(tmp_path)
    assert analyzer.fetch(tmp_path).read_bytes() == SCRIPT
    assert not served


def test_what_is_not_what_it_was_is_not_used(
    tmp_path: Path, served: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    other, nameless, changed = archive(), archive("qemu/README"), archive(script=b"print('other')\n")
    served.append(other)
    with pytest.raises(HostToolError, match=r"tar.xz is not what it was"):
        analyzer.fetch(tmp_path)
    for data, words in ((nameless, "has no"), (changed, "analyze-migration.py is not what it was")):
        served.append(data)
        monkeypatch.setattr(analyzer, "SOURCE_SHA256", analyzer._digest(data))
        with pytest.raises(HostToolError, match=words):
            analyzer.fetch(tmp_path)
    with pytest.raises(HostToolError, match="no route"):
        analyzer.fetch(tmp_path)
    assert not analyzer.home(tmp_path).exists()
