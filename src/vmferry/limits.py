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

# A number cut by the end of the buffer is scanned again when more comes; this keeps that cost bounded. No
# number that means anything has more than 24 characters.
QMP_NUMBER_BYTES_MAX = 512

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

# Events that a blocking client keeps while it waits for a reply: a migration makes about twenty.
QMP_EVENTS_KEPT_MAX = 1000

# How long an event that nobody waits for may wait for others, to leave with them: nobody sees so little, and a
# switchover, which makes about a dozen within a few milliseconds, is over before they are sent.
QMP_EVENT_GATHER_S = 0.02

# Sessions of one QMP server at a time: people, scripts and one per peer. A leak in a client shows up here.
QMP_SESSIONS_MAX = 64

# In-band commands that one session may have waiting; then it is not read from until one is done (QEMU: 8).
QMP_SESSION_QUEUED_MAX = 8

# Unsent events that one session may pile up before it is dropped as a reader that is too slow. An event is
# 0.2-2 kB, so a session that falls behind by thousands cannot be told the truth any more anyway.
QMP_SESSION_EVENT_BYTES_MAX = 4 << 20

# Unsent bytes above which a session's next reply waits, so that a slow reader holds up only itself.
QMP_SESSION_OUT_BYTES_MAX = 1 << 20

# How long a session may take no byte at all, with something to send to it, before it is dropped.
QMP_WRITE_STALL_S = 30.0

# How long a command of a monitor's client may take in QEMU. Some copy or flush whole images before they answer. No
# other command of a client is passed on meanwhile, and the agent's own wait as well: they go over the same session, and
# QEMU carries out one command of a session after the other. While a guest is on its way none that takes long is passed.
MONITOR_COMMAND_S = 600.0

# --- VMs and host probes --------------------------------------------------------------------------------

# A throw-away QEMU that tells what it can do answers in 0.05 s; a host under heavy load takes seconds.
VM_PROBE_S = 10.0

# How long qemu-img may take to make an empty image: it writes some hundred KiB.
IMAGE_TOOL_S = 20.0

# How long a guest of one sector may take to boot and print under KVM. A healthy KVM needs 0.2 s, TCG 0.1 s;
# a KVM that is itself emulated was seen to need 3.3 s, and is then forty times slower than TCG.
VM_KVM_BOOT_S = 2.0

# A spec is a page of text. The bound keeps a wrong path (a disk image, say) from being read into memory.
VM_SPEC_BYTES_MAX = 256 * 1024

# QEMU's own ceiling for the machine types that vmferry uses; beyond it QEMU's message is less clear than ours.
VM_CPUS_MAX = 288

# Disks and network cards sit on fixed slots of one PCI bus; that many fit beside the rest.
DISK_BITMAP_BYTES = 64 << 10
"""Of what a guest has written since it came with its disks, one bit for so much: QEMU's own default for most images. A
disk of 1 TiB costs 2 MiB of memory."""
DISK_ROUND_BYTES = 1 << 20
"""A disk that goes back in rounds: with less than this changed no new round begins. It is sent within some ms, and the
rest of it waits for the pause."""
DISK_ROUND_READY_BYTES = 16 << 20
"""With less than this left the disk counts as ready, and memory begins to move: some 0.1 s on a network of 1 Gbit/s."""
DISK_ROUND_PAUSE_BYTES = 64 << 20
"""What the last round of such a disk may have to send while the guest is paused; with more the guest goes on."""
DISKS_SHARE = 4
"""While memory moves, the disks that go along have one part in so many of the job's max-bandwidth, and memory the rest:
of a disk that is copied only what the guest writes is left, and that waits for the destination, limit or not."""
DISK_TRIED_S = 3600.0

# How seldom it is asked at last whether a guest runs where it went, so that what it left may be taken away: it may
# stand there for weeks, and room that is free ten minutes later is soon enough.
LEFT_IMAGE_ASK_S = 600.0

# Connections that an NBD server with certificates takes beside those of the source's mirrors: whoever only looks
# whether the port is open has one of them until QEMU finds out. Without certificates there are none to spare.
NBD_STRANGERS = 16
"""A whole copy of a disk, of a move that failed, is kept for so long: who tries again does it within the hour, and the
room is somebody else's."""
VM_DISKS_MAX = 12

# Files beside an image whose headers are read before a guest may write to that: 10 us each on a local disk, 1 ms over a
# network. Beyond, only what this agent itself wrote down is known of what lies on the image.
IMAGES_BESIDE_MAX = 2048

# How long that look may take: all of it over a slow network, and not what a mount takes whose server is gone.
IMAGES_BESIDE_S = 20.0
VM_NETWORKS_MAX = 8

# No firmware starts in less.
VM_MEMORY_BYTES_MIN = 1 << 20

# sun_path in Linux's sockaddr_un is 108 bytes with the final NUL.
UNIX_SOCKET_PATH_BYTES_MAX = 107

# QEMU's reason to refuse a start is a line or two; what comes before it is noise.
VM_LOG_TAIL_BYTES_MAX = 4096
VM_LOG_TAIL_LINES_MAX = 5

# A listener on this host accepts at once, or its queue is full because it is stuck.
VM_ADOPT_CONNECT_S = 2.0

# Beyond this, times in the reports of two hosts contradict each other visibly.
CLOCK_OFFSET_MS_MAX = 1000.0

# --- endpoints of the migration stream --------------------------------------------------------------------

# What is read from a migration connection at a time. Unix sockets hand out about 200 KiB at once; runs of pages inside
# one slab cost nothing per page, and what a slab cuts in two is copied once.
ENGINE_SLAB_BYTES = 1 << 20

# The first read of a connection, which tells what it is: a header is 8 bytes, a multifd introduction 64.
ENGINE_FIRST_BYTES = 4096

# Connections of one endpoint: main, preempt, 16 multifd channels (QEMU allows 255, nobody gains beyond 8), and a few
# strangers, who keep their place until they go away.
ENGINE_CONNECTIONS_MAX = 24

# TLS with a peer on the same network takes 5 ms.
ENGINE_HANDSHAKE_S = 10.0

# From the last byte sent to the destination's word that it has everything: it loads its devices in milliseconds, those
# of VFIO in seconds, and an owner that stores the guest first may need minutes. Only a destination that lost what one
# of several connections carried says nothing at all.
ENGINE_RESULT_S = 600.0

# No thread of an endpoint does anything long between two looks at its orders: a slab takes a millisecond.
ENGINE_STOP_S = 5.0

# Chunks of dirty bitmaps that are kept: each describes at least 10 KiB of bitmap, 5 GiB of disk.
ENGINE_BITMAP_CHUNKS_MAX = 65536

# What a source reads of its return path at a time: page requests of 12 bytes, and bitmaps in a recovery.
ENGINE_RETURN_PATH_BYTES = 64 << 10

# What the kernel may hold while pages are served on demand (Linux doubles the number for its own bookkeeping). It says
# "room" when a unix connection holds less than a quarter of that, or TCP less than two thirds: up to there the
# background fills, and the rest is for pages that were asked for.
ENGINE_SERVICE_SOCKET_BYTES = 256 << 10

# What lies unsent in a local connection's kernel during a precopy: four writes, so that neither end waits for the
# other to be scheduled. With the system's 208 KiB a busy machine needs a half longer; with 4 MiB the caches suffer.
ENGINE_STREAM_SOCKET_BYTES = 1 << 20

# Page requests that wait one by one: more than a guest has processors and devices. Beyond, the map of what was asked
# for is searched, so a peer that asks for everything takes no more memory than that.
ENGINE_SERVICE_QUEUE_MAX = 4096

# Neighbourhoods of requested pages that are remembered: a guest goes on in a few places at once, not in thousands.
ENGINE_SERVICE_NEAR_MAX = 64

# Service times that are kept for a report.
ENGINE_SERVICE_TIMES_MAX = 100_000

# A precopy ends when fewer pages than this are left and the image is not being filled any more: 4 ms of work.
ENGINE_LAST_ROUND_PAGES = 4096

# What is said to a source that does not listen: so many messages wait, then nothing more is read from it. A request
# has 300 bytes at most.
ENGINE_WORDS_MAX = 256

# Page requests that wait for their turn one by one; when there are more, only the map of them is kept.
ENGINE_REQUESTS_MAX = 4096

# QEMU sources were seen to take requests of 1 MiB.
ENGINE_REQUEST_BYTES_MAX = 1 << 20

# Pages of the preempt channel may come after the end of the main channel, but they left the source before it.
ENGINE_STRAGGLERS_S = 5.0

# A listener without descriptors for another connection: a look at whether there are some again.
ENGINE_ACCEPT_AGAIN_S = 0.1

# The largest guest that an endpoint believes in, unless its owner knows better: its maps take a byte per page.
ENGINE_GUEST_BYTES_MAX = 1 << 44

# Pages side by side that are worth a read of their own, straight to their place, instead of a copy from a slab.
ENGINE_DIRECT_PAGES = 8

# What a stand-in waits for a word of the other side: each step of a recovery takes milliseconds, but QEMU's main loop
# may hang for seconds on a busy host. Longer than that and the stand-in gives up, which leaves both sides as they were.
ENGINE_STAND_IN_SILENCE_S = 15.0

# Private blocks of a guest (firmware, tables, video memory) that an agent copies in case the process dies: a PC has
# 0.4 MiB of them, 16 MiB with a graphics card. Main memory is either in a shared file, which needs no copy, or too big.
RESCUE_COPY_BYTES_MAX = 64 << 20

# QEMU carries a migrate-pause out within milliseconds; its main loop may hang for seconds.
RESCUE_PAUSE_S = 10.0

# A whole rescue, by default: memory moves through a local socket at a GiB per second and more, so this is enough for
# a guest of 1 TiB; what moves nothing is given up much sooner (ENGINE_STAND_IN_SILENCE_S).
RESCUE_S = 1800.0

# --- jobs -------------------------------------------------------------------------------------------------

# Concluded jobs that wait to be dismissed: each holds a result of some 10 kB in memory and in the journal. Beyond, no
# new job is taken that would wait too: who asked for results to be kept does not read them, and none is dropped.
JOBS_UNDISMISSED_MAX = 500

# Migrations of which an agent remembers while it runs how they ended, beyond those whose results it keeps: 200 bytes
# each. A place that was not released asks for it when its host is back; of one that is forgotten it waits for a person.
JOBS_PROVEN_MAX = 20_000

# Places for guests of which an agent remembers while it runs how they ended: 2 KB each. Of one that is forgotten a
# source that had told it to run the guest hears that nobody knows.
PLACES_PROVEN_MAX = 2_000

# Blockers that people hold on one VM: a list that nobody reads any more protects nothing.
BLOCKERS_MAX = 32

# --- channels through an agent ----------------------------------------------------------------------------

# How long a QEMU in postcopy may take for a question before it is taken for one whose main loop waits for a page. It
# answers within a millisecond; one that was only busy loses nothing but speed by being taken for one that hangs.
RECOVERY_ANSWER_S = 1.0

# What a relay reads at a time: more than a socket hands out at once, and small beside anything else here.
RELAY_CHUNK_BYTES = 256 << 10

# From the connection of a recovery to the first byte of the source's QEMU. Its agent waits 10 s at most for the word
# that this side is ready, and tells its QEMU to resume within the 5 s of a command.
RELAY_FIRST_BYTE_S = 30.0

# From the end of one direction to that of the other one. A QEMU that is done closes its whole connection within
# milliseconds; what is still on its way at that moment was acknowledged by the other one before.
RELAY_LINGER_S = 10.0

# --- a recovery beside the agents' link --------------------------------------------------------------------

# Ports at which a place may be called, in the order of both sides: the first is free but for chance, and a source that
# tries them all waits for as many refusals.
RECOVERY_PORTS_MAX = 16

# The facts of a place and where its QEMU listens: less than 1 KiB, and a reason, which may be QEMU's own words.
RECOVERY_WORD_BYTES_MAX = 16 << 10

# How long an agent's link may take for a question that needs no QEMU, before the destination is called without it: ten
# round trips around the world. Guest and source stand still meanwhile.
RECOVERY_LINK_S = 0.5

# Until the destination's agent has shown that it has the token: three round trips.
RECOVERY_CONNECT_S = 0.8

# All addresses and ports of one call: each that refuses takes a round trip, one that is silent RECOVERY_CONNECT_S.
RECOVERY_CALL_S = 4.0

# From the token to the word: a QEMU that hangs is asked for RECOVERY_ANSWER_S and has seconds to pause.
RECOVERY_WORD_S = 10.0

# The longest pause between two tries to join a broken postcopy: each costs a connection or two, and a guest that lacks
# pages stands still.
RECOVERY_PAUSE_S = 0.3

# --- repositories of snapshots ----------------------------------------------------------------------------

# "packs/", two digits, "/", 32 digits: what an object's name needs, and some room.
STORE_NAME_CHARACTERS_MAX = 128

# Packs that stay open for reading, each one descriptor: those that a restore works on, and their neighbours.
STORE_OPEN_FILES_MAX = 64

# One request to an object store: a pack of 16 MiB in this time needs 5 Mbit/s.
STORE_REQUEST_S = 30.0

# Failed requests are tried again by the library, with growing pauses; then the caller hears of it and decides.
STORE_RETRIES_MAX = 5
STORE_RETRY_S = 60.0

# A pack is closed when it has this size: large enough for few objects and few requests, small enough to be kept in
# memory while it is filled, and to be thrown away and written again when a part of it is not needed any more.
STORE_PACK_BYTES = 16 << 20

# What a pack of somebody else may have at most.
STORE_PACK_BYTES_MAX = 256 << 20

# Pages that are compressed together. A lazy restore that wants one page inflates all of them: 8 pages take 18 us, 16
# take 54; at zstd's level 3 eight pages compress better than sixteen do at level 1 (decision 0031).
STORE_FRAME_PAGES = 8
STORE_FRAME_PAGES_MAX = 64

# zstd's level: 3 is 4 % smaller than 1 in frames of 32 KiB, at two thirds of its speed (decision 0031).
STORE_ZSTD_LEVEL = 3

# A changed page is stored as its difference to the page that it was if at most so many of its bytes differ.
STORE_DIFFERENT_BYTES_MAX = 1024

# Pages that one index object describes: 4 MiB of ids, written after every GiB of new pages. Whoever looks through all
# indexes holds one at a time.
STORE_INDEX_PAGES = 1 << 18
STORE_INDEX_PAGES_MAX = 1 << 23

# Known pages that a writer compares new ones with, at 20 bytes each: 84 MB, for 16 GiB of unique pages; with a pack,
# its copy and what sorting takes a writer stays below 200 MB. What does not fit is stored again if it comes again: that
# costs room, never a page.
STORE_KNOWN_PAGES_MAX = 4 << 20

# Sorted runs of known pages are merged up to this size: merging takes as much memory again as the run has.
STORE_KNOWN_RUN_PAGES_MAX = 1 << 19

# The head of an object is a description of some kilobytes; that of a manifest carries what its owner wrote into it.
STORE_HEAD_BYTES_MAX = 16 << 20

# Heads that are kept for the next listing, as they are stored: some hundred, at three times that in memory.
STORE_HEADS_KEPT_BYTES = 4 << 20

# Heads of manifests that are read side by side for a listing: of an object store each is a round trip of 10 to 100 ms,
# and 500 shall take seconds and not a minute. Each has a thread and 64 KiB for that long.
STORE_HEADS_AT_ONCE = 16

# Device state of QEMU has some 100 KiB, with vGPUs some GiB; it is held in memory.
STORE_DEVICE_STATE_BYTES_MAX = 1 << 30

# Pages of one snapshot: a guest of 4 TiB. The page table takes 4 bytes for each while a snapshot is read.
STORE_SNAPSHOT_PAGES_MAX = 1 << 30

# What a manifest has at most: a full table, as it is before it is compressed, and the rest. A table that zstd cannot
# make smaller grows by some bytes per 128 KiB.
STORE_MANIFEST_BYTES_MAX = (
    STORE_HEAD_BYTES_MAX + STORE_DEVICE_STATE_BYTES_MAX + STORE_SNAPSHOT_PAGES_MAX * 4 + (1 << 20)
)

# When a snapshot was made, in seconds since 1970: until the year 4147. What a host cannot show as a date is not one.
STORE_CREATED_S_MAX = float(1 << 36)

# RAM blocks of one snapshot: QEMU's guests have about ten.
STORE_BLOCKS_MAX = 4096

# Inflated frames that a reader keeps for neighbours: 64 of 32 KiB.
STORE_FRAMES_KEPT = 64

# How long a reader goes by what it found nowhere in the repository: looking lists all packs and reads all indexes.
STORE_LOOK_AGAIN_S = 1.0

# What a reader asks a store for at a time when it reads a run of pages: one request of an object store is paid for by
# its answer from about a MiB on.
STORE_READ_BYTES = 4 << 20

# A lock that was not renewed for so long belongs to somebody who is dead. A writer renews it ten times as often, and
# commits nothing without having seen that it is still there.
STORE_LOCK_STALE_S = 1800.0
STORE_LOCK_RENEW_S = 180.0

# What nobody refers to is left alone while it is younger: locks keep savers and pruners apart, and this is for the day
# on which somebody deletes locks by hand. Half-written files of a put that goes on in this moment need it, too.
STORE_PRUNE_GRACE_S = 3600.0

# Packs that a prune empties at a time, before it deletes them: what it writes of them is the room that it needs beside
# what it has freed, half of it by default (64 MiB). Each such step ends with an index of its own, so not fewer.
STORE_PRUNE_BATCH_PACKS = 8

# scrypt with more than this is an attack on the memory of whoever opens the repository.
STORE_SCRYPT_BYTES_MAX = 256 << 20

# --- restores of snapshots --------------------------------------------------------------------------------

# Pages that were read from a repository and have not left for the guest: 8 MiB, whatever the guest's size. The sender
# takes them in milliseconds; more would only be memory.
RESTORE_PAGES_HELD_MAX = 2048

# Pages that a lazy restore reads at a time behind the guest: a millisecond of work, so that what the guest asks for
# next is read soon after. A full restore reads more at a time, nobody waits for single pages then.
RESTORE_LAZY_RUN_PAGES = 64
RESTORE_FULL_RUN_PAGES = 512

# A read of the repository that takes longer is told as trouble while it still goes on: an object store's library tries
# by itself for a minute before it says anything.
RESTORE_STALL_S = 3.0

# Whoever reads ahead waits until the guest has not asked for the first time, but at most the second before a run: what
# it asks for needs the interpreter and a processor, and comes in bursts. In a burst without end a run goes every 3 ms.
RESTORE_QUIET_S = 0.001
RESTORE_STEP_BACK_S = 0.003

# How many pages behind one that was asked for are read next.
RESTORE_NEAR_PAGES = 16

# Neighbourhoods that wait to be read; an old one is dropped, the background gets there.
RESTORE_NEAR_MAX = 64

# A repository that does not answer, or a damaged object, is tried again after the first pause, then after longer ones.
# A guest that waits for a page goes on by itself that soon after the repository is back.
RESTORE_RETRY_MIN_S = 0.1
RESTORE_RETRY_MAX_S = 2.0

# Of one processor's time, for finding out which pages of a damaged run are right: with a repository of which most is
# gone it would take a whole one for as long as nobody brings it back.
RESTORE_APART_SHARE = 0.1

# First touches of one snapshot that are remembered: 512 MiB of memory, in a file of 1 MiB.
# Later ones are not worth it: the background has come by.
RESTORE_ORDER_PAGES_MAX = 1 << 17

# Snapshots whose first touches an agent remembers; the oldest are forgotten.
RESTORE_ORDERS_MAX = 256

# From the last page of a restore to QEMU's word that it has everything: it may have a queue of pages to place, and its
# main loop may wait for the guest's disks.
RESTORE_RESULT_S = 120.0

# From the device state in a QEMU to its word that it stands ready, and from there to its first instruction: its main
# loop may wait for pages of the guest, which come from the repository.
RESTORE_CONT_S = 30.0

# A QEMU whose channel broke is asked to listen again after the first pause, then after longer ones.
RESTORE_REJOIN_MIN_S = 0.05
RESTORE_REJOIN_MAX_S = 2.0

# How often a restore that is on its way tells how far it is, and sees that its lock on the repository is renewed.
RESTORE_TICK_S = 0.5

# How often the owner of an open snapshot's lock looks whether it is time to renew it.
RESTORE_RENEW_S = 10.0

# Memory of a guest that is not its RAM: video memory, firmware, tables. The largest video memory is 512 MiB. A snapshot
# that says more than that beside the RAM of its definition is not of that guest; its page tables, which take 8 bytes
# per page in the agent, are not read then.
RESTORE_OTHER_MEMORY_BYTES_MAX = 1 << 30

# Between two tries to take a pin away from a repository that does not answer, at most.
RESTORE_UNPIN_MAX_S = 60.0

# Restores of one agent that are on their way: each has four threads and some bytes per page of its guest.
RESTORES_MAX = 64

# --- snapshots of guests ----------------------------------------------------------------------------------

# Threads of an agent that wait for its repository: saves, restores, and a listing beside them. Each has at most one
# piece of work, and more than a few at a time only make each other slow.
SNAPSHOT_THREADS_MAX = 8

# Passes over a guest's memory before a save stops it for the rest: each pass that a guest keeps up with costs as much
# room as it writes, and after a dozen the next dozen would not end otherwise.
SAVE_PASSES_MAX = 12

# A copy of a disk that is saved may have sent so many times what the disk has, and so much more for a small one: then
# the guest writes faster than it is copied. The copy of a guest that writes half as fast ends after twice its size.
SAVE_COPY_TIMES = 4
SAVE_COPY_MORE_BYTES = 1 << 30

# What a copy of a disk may lack as the memory begins to go. A guest that never stops writing is never quite equal to
# its copy; this is written in the pause, in less than a second on any disk that can carry a guest.
SAVE_COPY_REST_BYTES = 32 << 20

# What copies leave free on a file system on which the guest's own images or the agent's journal are: an image that
# cannot grow stops its guest.
SAVE_COPY_LEAVES_BYTES = 256 << 20

# The guest stands while the copies of its disks get the rest of what it wrote: as in a migration.
SAVE_DRAIN_S = 8.0

# How long copies that are given up may take to end before they are asked again.
SAVE_OBEY_S = 3.0

# How long a save's guest may stand while a person's leave is awaited (auto-finalize is off): as in a migration.
SAVE_HOLD_S = 60.0

# From QEMU's last byte to the end of the endpoint's work on it: a pack and a table of pages.
SAVE_WHOLE_S = 600.0

# How long a guest that was saved is tried to be started again before a person hears that it stands.
SAVE_RETURN_S = 60.0

# Pages of a save that wait for its writer: enough for the stream to go on while a pack is put, small in an agent.
SAVE_QUEUE_BYTES = 8 << 20

# What setting pages aside leaves free on the disk of the agent's state: a journal that cannot be written stops every
# migration of the host.
SAVE_SPILL_LEAVES_BYTES = 256 << 20

# The end of a save's endpoint and of its lock in the repository: with the store away it may never come, and what stays
# gets stale by itself.
SAVE_CLEAN_UP_S = 5.0

# A look for a snapshot whose commit was not answered: after that it is not known, and a person looks later.
SAVE_LOOK_S = 120.0

# Writing and reading stream files: at 50 MB/s, a guest of a TiB.
SNAPSHOT_FILE_S = 6 * 3600.0

# Chores of one agent (verify, prune, export, import) that are on their way: each has a thread, and reads as fast as
# the store gives. More than a few at a time only make each other slow.
CHORES_MAX = 8

# How long a prune's plan waits for a person's leave: they read it now, or plan anew. It holds no lock meanwhile.
PRUNE_HOLD_S = 3600.0
