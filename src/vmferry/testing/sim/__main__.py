"""Runs seeds: `python -m vmferry.testing.sim --seed 7`, `--seeds 200`, `--json`, `--trace`."""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import sys
import time
from pathlib import Path

from vmferry.testing.sim.run import Verdict, run


def _line(verdict: Verdict) -> str:
    said = "ok" if verdict.ok else "FAILED"
    faults = "; ".join(verdict.faults) or "no fault"
    return f"seed {verdict.seed}: {said}, {verdict.outcome}, {verdict.virtual_ms / 1000:.1f} s virtual, {faults}"


def _one(seed: str, *, as_json: bool, shows_trace: bool) -> int:
    verdict = run(seed)
    if as_json:
        print(json.dumps(verdict.to_wire()))
    else:
        if shows_trace or not verdict.ok:
            print("\n".join(verdict.trace))
        print(_line(verdict))
        for violation in verdict.violations:
            print(f"  {violation}")
        if not verdict.ok:
            print(f"again: make sim SEED={seed}")
    return 0 if verdict.ok else 1


def _many(first: int, count: int, *, as_json: bool, jobs: int, traces: Path | None) -> int:
    began_s = time.monotonic()
    failed: list[Verdict] = []
    outcomes: collections.Counter[str] = collections.Counter()
    seeds = [str(number) for number in range(first, first + count)]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for verdict in pool.imap(run, seeds, chunksize=8):
            outcomes[verdict.outcome] += 1
            if not verdict.ok:
                failed.append(verdict)
                if traces is not None:
                    (traces / f"{verdict.seed}.txt").write_text("\n".join([*verdict.trace, *verdict.violations]) + "\n")
                if not as_json:
                    print(_line(verdict))
                    print("\n".join(f"  {violation}" for violation in verdict.violations))
                    print(f"  again: make sim SEED={verdict.seed}", flush=True)
    took_s = time.monotonic() - began_s
    if as_json:
        said = {
            "seeds": count,
            "ok": count - len(failed),
            "failed": [verdict.to_wire() for verdict in failed],
            "outcomes": dict(outcomes.most_common()),
            "seconds": round(took_s, 1),
        }
        print(json.dumps(said))
    else:
        for outcome, number in outcomes.most_common():
            print(f"{number:6} {outcome}")
        print(f"{count} seeds, {len(failed)} failed, {count / took_s:.1f} seeds per second")
    return 1 if failed else 0


def main(argv: list[str]) -> int:
    """0: every seed kept what must hold; 1: one did not, and was shown."""
    parser = argparse.ArgumentParser(prog="sim", description="real agents on a clock, a net and QEMUs that are values")
    parser.add_argument("--seed", help="one seed, with its trace if it fails")
    parser.add_argument("--seeds", type=int, default=100, help="how many seeds, from --first on")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--trace", action="store_true", help="with --seed: show the trace of a good run, too")
    parser.add_argument("--traces", type=Path, help="with --seeds: a folder for the traces of failed ones")
    options = parser.parse_args(argv)
    if options.seed is not None:
        return _one(options.seed, as_json=options.json, shows_trace=options.trace)
    return _many(options.first, options.seeds, as_json=options.json, jobs=options.jobs, traces=options.traces)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
