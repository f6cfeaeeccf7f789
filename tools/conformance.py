"""Which test shows which point of conformance with QEMU's migration stream: the text of docs/conformance.md.

    python tools/conformance.py      prints the points that no test shows; exit 1 if there is one

A test says what it shows with `@pytest.mark.conforms("22", "23")`. D: as a destination, S: as a source. `EXCEPT` has
the points that cannot be shown with a real QEMU here, or not in full, with the reason.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.requirements import proofs

ROOT: Final = Path(__file__).resolve().parent.parent
POINTS: Final[dict[str, str]] = {
    "1": "D: refuses a wrong magic and stream versions other than 3.",
    "2": "D: reads a configuration with and without its subsections: uuid, capabilities, page bits.",
    "3": "D: takes precopy from 7.2 and 11.1, old and new machine types, with and without return path.",
    "4": "D: footers on and off; a wrong one is refused.",
    "5": "D: thousands of empty parts cost little.",
    "6": "D: a record that continues a block does so over section borders, and not on a new connection.",
    "7": "D: zero, plain, xbzrle and compressed pages decode to what the guest had.",
    "8": "D: device sections before RAM.",
    "9": "D: a stream without RAM's end (background snapshot).",
    "10": "D: the end of a stream is found once, at the right byte, in any chunking.",
    "11": "D: the vmdescription's sizes are those of the sections.",
    "12": "D: a stream without vmdescription is refused, or taken when that was asked for.",
    "13": "D: an unknown iterable section ends in SHUT 1 and a close, and nothing is kept.",
    "14": "D: dirty bitmaps in precopy and postcopy.",
    "15": "D: unknown commands, RAM flags and tags are refused.",
    "16": "D: every ping is answered, whatever its value and order.",
    "17": "D: an 11.1 source stays in postcopy-device while the proof is held back, and takes its guest back then.",
    "18": "D: SHUT 0 only after the owner's word; the source is completed only after it.",
    "19": "D: after the commit no path says SHUT with an error.",
    "20": "D: page requests are aligned, inside their block, and name it first, after a change and after a recovery.",
    "21": "D: a discard takes pages back; they come again.",
    "22": "D: recovery: bitmaps in the order of the questions with their end mark, RESUME_ACK 1.",
    "23": "D: multifd none, zlib, zstd from 7.2 and 11.1, barriers by section or by record.",
    "24": "D: what 7.2 does on multifd: SYNC with data, empty packets, old sizes.",
    "25": "D: multifd connections before the main one, and in any order.",
    "26": "D: the preempt channel, early and late, ended by a record or a close.",
    "27": "D: TLS on every channel.",
    "28": "D: the rule of switchover-ack.",
    "29": "D: the source cancels while the owner stores: nothing is started, the image is given up.",
    "30": "D: mapped-ram files, with an offset, with and without multifd.",
    "31": "S: precopy of a stored image is taken by 7.2 and 11.1.",
    "32": "S: an own stream with an empty vmdescription is taken.",
    "33": "S: SWITCHOVER_START only for machine types from 10.0 on.",
    "34": "S: ADVISE has the destination's values, and only with postcopy.",
    "35": "S: discards cover exactly the pages that were not sent, 12 ranges at most in one.",
    "36": "S: no page leaves twice after its discard.",
    "37": "S: requests before pong 3 are served.",
    "38": "S: requests name their block or mean the last one; repeated ones are ignored.",
    "39": "S: END and EOF only after all pages; then SHUT 0 is waited for.",
    "40": "S: recovery from bitmaps, also after a second loss.",
    "41": "S: a connection lost between LISTEN and RUN is a failure, and the image is whole.",
    "42": "S: preempt: early with EOS for machine types up to 7.2, late for newer.",
    "43": "S: multifd: main first; SYNC by section or by record, as the machine type has it.",
    "44": "S: huge pages: page size in the block list, whole host pages together.",
    "45": "both: an image from 7.2 runs on 11.1 and the other way round.",
    "46": "both: the guest's memory is the same before and after; a paused guest stays paused.",
    "47": "both: cuts at random points never give two running guests, or none with data lost.",
}
EXCEPT: Final[dict[str, str]] = {}


def docs_markdown() -> str:
    """The text of docs/conformance.md."""
    found = proofs(ROOT / "tests", mark="conforms", known=POINTS)
    lines = [
        "# Conformance with QEMU's migration stream",
        "",
        "<!-- made by tools/gen_docs.py from tools/conformance.py and the marks in tests/; do not edit -->",
        "",
        "What an endpoint of the migration stream must do for QEMU 7.2 to 11.1, as a destination (D) or a source (S),",
        "and the tests that carry the point's number (`@pytest.mark.conforms`).",
        "",
        "| | point | shown by |",
        "|---|---|---|",
    ]
    for number, text in POINTS.items():
        shown = [f"`{test}`" for test in found[number]]
        if number in EXCEPT:
            shown.append(EXCEPT[number])
        lines.append(f"| {number} | {text} | {'<br>'.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """0 = every point is shown or has its reason; 1 = the others, one per line."""
    found = proofs(ROOT / "tests", mark="conforms", known=POINTS)
    missing = [number for number in POINTS if not found[number] and number not in EXCEPT]
    for number in missing:
        print(f"{number:3} {POINTS[number]}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
