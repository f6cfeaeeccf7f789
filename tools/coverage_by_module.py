"""Checks that each pure module is covered completely, branches included, by its own test file alone.

    python tools/coverage_by_module.py           measures all; exit 1 and the lines that are missing
    python tools/coverage_by_module.py facts     only modules whose path contains one of the words

One pytest run in this process measures everything: what a module executes while it is imported counts for
nobody, what it executes later counts for the test file that is running. Another file's test therefore cannot
cover for the module's own.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import coverage
import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
SOURCE: Final = ROOT / "src" / "vmferry"
CORE_TABLES: Final = {
    "core/source_rows.py": "tests/table/test_both_tables.py",
    "core/destination_rows.py": "tests/table/test_both_tables.py",
    "core/disk_reports.py": "tests/unit/core/test_disks.py",
    "core/option_table.py": "tests/unit/core/test_options.py",
    "core/transitions.py": "tests/unit/core/test_status.py",
}
"""Tables of values, proved by the test that walks them."""
WIRE_VALUES: Final = {
    "errors.py": "tests/unit/wire/test_stream.py",
    "events.py": "tests/unit/wire/test_encode.py",
    "limits.py": "tests/unit/wire/test_ram.py",
}
"""Values of the wire, proved where they are used."""
OTHERS: Final = {
    "errors.py": "tests/unit/test_errors.py",
    "units.py": "tests/unit/test_units.py",
    "qmp/codec.py": "tests/unit/qmp/test_codec.py",
    "agent/observe.py": "tests/unit/agent/test_observe.py",
    "agent/config.py": "tests/unit/agent/test_config.py",
    "engine/machine_types.py": "tests/unit/engine/test_machine_types.py",
    "jobs/journal.py": "tests/unit/jobs/test_journal.py",
    "store/config.py": "tests/unit/store/test_store_config.py",
    "store/lock.py": "tests/unit/store/test_lock.py",
}
"""Pure modules outside core, and those that everything else relies on after a crash."""
STORE_FORMATS: Final = ("compression", "envelope", "index", "known", "manifest", "pack", "page_ids", "seal")
"""What a repository's bytes mean: pure, and read for years."""
AT_IMPORT: Final = "import"


def pairs() -> dict[Path, str]:
    """Module -> its own test file, relative to the root."""
    found = {}
    for path in sorted((SOURCE / "core").glob("*.py")):
        name = f"core/{path.name}"
        if path.name != "__init__.py":
            found[path] = CORE_TABLES.get(name, f"tests/unit/core/test_{path.stem}.py")
    for path in sorted((SOURCE / "wire").glob("*.py")):
        if path.name != "__init__.py":
            found[path] = WIRE_VALUES.get(path.name, f"tests/unit/wire/test_{path.stem}.py")
    found |= {SOURCE / "store" / f"{name}.py": f"tests/unit/store/test_{name}.py" for name in STORE_FORMATS}
    found |= {SOURCE / name: test for name, test in OTHERS.items()}
    return found


class ExamplesOnly:
    """Runs of a property only its explicit examples: what it happens to draw must not decide what counts as proved."""

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self) -> None:
        import hypothesis  # not before: pytest wants to see its import

        hypothesis.settings.register_profile("examples", phases=[hypothesis.Phase.explicit])
        hypothesis.settings.load_profile("examples")


class ContextPerFile:
    """Tells coverage which test file is running."""

    def __init__(self, measured: coverage.Coverage) -> None:
        self._measured = measured

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Iterator[None]:
        self._measured.switch_context(_relative(collector.path))
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._measured.switch_context(_relative(item.path))
        return (yield)


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def measure(modules: dict[Path, str], data_file: str) -> tuple[int, coverage.CoverageData]:
    """Runs the test files; pytest's exit code and what was executed."""
    measured = coverage.Coverage(data_file=data_file, branch=True, include=[str(path) for path in modules])
    measured.start()
    measured.switch_context(AT_IMPORT)
    for path in modules:
        importlib.import_module(".".join(path.relative_to(SOURCE.parent).with_suffix("").parts))
    tests = sorted({str(ROOT / test) for test in modules.values()})
    options = ["-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    code = pytest.main([*options, *tests], plugins=[ContextPerFile(measured), ExamplesOnly()])
    measured.stop()
    measured.save()
    return int(code), measured.get_data()


def own_data(modules: dict[Path, str], data: coverage.CoverageData, data_file: str) -> None:
    """Keeps for each module only what its own test file (or the import) executed."""
    own = coverage.CoverageData(data_file)
    for path, test in modules.items():
        data.set_query_contexts([f"^{AT_IMPORT}$", f"^{test.replace('.', '[.]')}$"])
        own.add_arcs({str(path): data.arcs(str(path)) or []})
    own.write()


def main(words: Sequence[str]) -> int:
    """0 = all complete; 1 = something is missing, or a test failed."""
    modules = {path: test for path, test in pairs().items() if not words or any(word in str(path) for word in words)}
    absent = [test for test in modules.values() if not (ROOT / test).exists()]
    if absent:
        print("no test file: " + ", ".join(sorted(absent)))
        return 1
    with tempfile.TemporaryDirectory() as folder:
        code, data = measure(modules, f"{folder}/all")
        if code:
            return 1
        own_data(modules, data, f"{folder}/own")
        report = coverage.Coverage(data_file=f"{folder}/own", branch=True)
        report.load()
        percent = report.report(show_missing=True, skip_covered=True, file=sys.stdout)
    return 0 if percent == 100.0 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
