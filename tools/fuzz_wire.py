"""Fuzzes the migration wire: any bytes give events, NEED_DATA, DONE or one `WireError`.

    python tools/fuzz_wire.py [libFuzzer's options, such as -max_total_time=3600] [CORPUS]

Needs `atheris`, which is no dependency of this project. Without it `tests/property/test_wire_fuzz.py` checks the same
invariants, those of `tests/wire_invariants.py`, with hypothesis. An empty corpus is filled with well-formed streams.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    """Runs atheris until it finds something or is stopped."""
    try:
        atheris = import_module("atheris")
    except ImportError:
        sys.exit("atheris is not installed; tests/property/test_wire_fuzz.py checks the same with hypothesis")
    with atheris.instrument_imports(include=["vmferry.wire"]):
        invariants = import_module("tests.wire_invariants")
    for argument in sys.argv[1:]:
        if not argument.startswith("-"):
            _fill(Path(argument), invariants)
    atheris.Setup(sys.argv, invariants.one_input)
    atheris.Fuzz()


def _fill(corpus: Path, invariants: Any) -> None:
    if corpus.is_dir() and not any(corpus.iterdir()):
        for kind, seeds in invariants.seeds().items():
            for number, seed in enumerate(seeds):
                (corpus / f"{kind}-{number}").write_bytes(bytes([kind, 3]) + seed)


if __name__ == "__main__":
    main()
