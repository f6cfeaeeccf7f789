"""Every maximum and default wait of vmferry, each with its reason.

Rule 1: a number that bounds memory, time or a queue lives here, not where it is used.
Rule 2: the unit is the last part of the name before `_MAX` / `_MIN`.
"""

from __future__ import annotations

# --- QMP ------------------------------------------------------------------------------------------------

# QEMU's longest reply is query-qmp-schema, 0.3 MB in QEMU 11.1; qemu.qmp gives up at 10 MB. Fifty times the
# longest known reply is room enough and still a bound on what a broken peer can make us hold.
QMP_MESSAGE_BYTES_MAX = 16 << 20

# What a client of the agent may send in one command: a whole VM spec is some kilobytes.
QMP_COMMAND_BYTES_MAX = 1 << 20

# QEMU allows 1024 levels, but Python's JSON scanner uses the interpreter's recursion limit of 1000. The
# deepest known reply is query-block over a long backing chain, two levels per image.
QMP_DEPTH_MAX = 256

# QEMU stops reading a monitor, out-of-band commands included, once 8 in-band commands are queued. Staying
# well below keeps `yank` and `migrate-pause` deliverable whatever the in-band commands wait for.
QMP_IN_BAND_UNANSWERED_MAX = 4

# Out-of-band commands answer in milliseconds; more than this many unanswered means that nobody listens.
QMP_OUT_OF_BAND_UNANSWERED_MAX = 8

# How long a command may take unless its caller knows better. Longest seen for an answer that does come:
# 2.6 s (destination loading device state with the big lock held).
QMP_DEADLINE_S = 10.0

# How long a monitor may take to greet and negotiate. A fresh QEMU under TCG greets within 0.3 s.
QMP_CONNECT_DEADLINE_S = 10.0

# How long closing a connection may wait for the other side's goodbye (TLS) before it is cut.
QMP_CLOSE_DEADLINE_S = 1.0

# How much is read from a QMP connection at a time: one query-migrate is 1-2 kB, so this is never the brake.
QMP_READ_BYTES = 64 << 10
