"""QEMU's migration stream, without any I/O: bytes in, events out, and back.

| channel | decoder | what is on it |
|---|---|---|
| main | `stream.StreamDecoder` | header, configuration, sections, commands, the end |
| return path | `return_path.ReturnPathDecoder` | the destination's answers and page requests |
| multifd | `multifd.MultifdDecoder` | packets of pages |
| preempt | `preempt.PreemptDecoder` | requested pages |

All have `feed(bytes)` and `next()`, which gives an event of `events`, NEED_DATA or DONE, or raises
`errors.WireError`. `encode.encode(event)` gives the bytes of any event back.

Rule 1: nothing in this room reads, writes, waits, knows the time or draws lots.
Rule 2: any bytes give events, NEED_DATA, DONE or one WireError; another exception is a bug.
Rule 3: no memory is taken because of a length that a peer claims, only for bytes that have come.
"""
