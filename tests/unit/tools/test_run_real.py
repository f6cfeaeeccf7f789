"""Which tests are tried once more."""

from __future__ import annotations

import json
from pathlib import Path

from tools.run_real import failed_before


def test_what_failed_below_the_paths_that_ran(tmp_path: Path) -> None:
    assert failed_before(["tests"], root=tmp_path) == []
    cache = tmp_path / ".pytest_cache" / "v" / "cache"
    cache.mkdir(parents=True)
    (cache / "lastfailed").write_text(json.dumps({"tests/unit/a.py::b": True, "tests/real/c.py::d[1]": True}))
    assert failed_before(["tests/golden", "tests/unit/"], root=tmp_path) == ["tests/unit/a.py::b"]
    assert failed_before(["tests/real"], root=tmp_path) == ["tests/real/c.py::d[1]"]
    (cache / "lastfailed").write_text("{")
    assert failed_before(["tests"], root=tmp_path) == []
