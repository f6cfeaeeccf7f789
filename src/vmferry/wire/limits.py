"""Every length that a peer may claim on the migration wire, each with its reason.

Rule 1: a length read from the wire is compared with a number from here before anything is done with it.
Rule 2: nothing is allocated from a claimed length, not even an allowed one: buffers grow with what has come.
"""

from __future__ import annotations

# --- names and numbers ------------------------------------------------------------------------------------

# QEMU's machine names have about 20 characters (`pc-i440fx-11.1`); its own buffers for names have 256 bytes.
MACHINE_NAME_BYTES_MAX = 256

# QEMU knows two capabilities that are sent (x-ignore-shared, mapped-ram); room for a few that may follow.
CAPABILITIES_MAX = 16

# A configuration has at most three kinds of subsections, each once.
CONFIGURATION_SUBSECTIONS_MAX = 8

# Pages of the targets that QEMU emulates: 1 KiB (old ARM) to 64 KiB. The flags of RAM need the low 10 bits.
TARGET_PAGE_BITS_MIN = 10
TARGET_PAGE_BITS_MAX = 16

# Sections of one stream. A PC has 30 to 50, a guest with hundreds of devices some thousands.
SECTIONS_MAX = 16384

# Section numbers count up from 0. Used only where a footer is searched for, to tell one from mere bytes.
PLAUSIBLE_SECTION_ID_MAX = 1 << 24

# Versions of device state are below 100 today. Used like the number above.
PLAUSIBLE_VERSION_MAX = 1 << 16

# --- RAM ----------------------------------------------------------------------------------------------------

# A PC has 6 to 20 RAM blocks; a guest with hundreds of devices has one option ROM each.
RAM_BLOCKS_MAX = 4096

# 4 PiB is QEMU's own limit of physical addresses on x86 (52 bits). Keeps every sum far away from 64 bits.
RAM_BYTES_MAX = 1 << 52

# A compressed page that is longer than this would have been sent plain: zlib's worst case is 11 bytes more
# than the page, and QEMU's own receiver takes compressBound(page).
COMPRESSED_PAGE_SLACK_BYTES = 1024

# --- commands -----------------------------------------------------------------------------------------------

# QEMU discards at most 12 ranges at a time: 20 + 255 bytes of names, 16 bytes a range. We take what fits into
# the 16 bits of the length, which cannot be exceeded; this is the number of ranges that can.
DISCARD_RANGES_MAX = 65535 // 16

# The package of postcopy's switchover, all device state: 13 kB for a small PC. QEMU's limit was 16 MiB until
# 9.2 and is 4 GiB since; an agent may use 100 MB beside the guest, and holds it once.
PACKAGE_BYTES_MAX = 64 << 20

# --- device state -------------------------------------------------------------------------------------------

# All device sections of a precopy stream until their end is proven. As the package, for the same devices.
DEVICES_BYTES_MAX = 64 << 20

# One early section (virtio-mem: 44 bytes, plus a bitmap of the plugged blocks).
EARLY_SECTION_BYTES_MAX = 16 << 20

# The vmdescription: about 100 kB for a PC with 31 devices; this is forty times as much. As Python's objects JSON can
# take twenty times its size, which has to stay below what an agent may use.
DESCRIPTION_BYTES_MAX = 4 << 20

# Places that look like the beginning of a vmdescription (00 06 <length> {") inside device state. In real
# streams there is one. Each one costs one attempt to read JSON, so a hostile stream must not have many.
DESCRIPTION_CANDIDATES_MAX = 64

# Places that look like a footer, over a whole search with its steps back. Real streams have one or two per
# section. Each costs a look at what follows it.
FOOTER_CANDIDATES_MAX = 1 << 18

# Bytes that a search for footers may pass over, with its steps back: a second of work. A real search passes over
# its bytes about once; a hostile one could have the rest of a package searched for each of thousands of sections.
FOOTER_SEARCH_BYTES_MAX = 512 << 20

# --- other iterable sections ----------------------------------------------------------------------------------

# QEMU serializes bitmaps in parts of at most 10 KiB.
BITMAP_CHUNK_BYTES_MAX = 10240

# --- return path ----------------------------------------------------------------------------------------------

# QEMU's source has a buffer of 512 bytes for a message.
RETURN_PATH_BYTES_MAX = 512

# A bitmap of received pages: 1 bit per 4 KiB page, so this is enough for one block of 8 TiB, four times what
# QEMU guests have today. It travels in pieces, so nobody holds it because of this number.
RECEIVED_BITMAP_BYTES_MAX = 256 << 20

# --- multifd --------------------------------------------------------------------------------------------------

# One packet describes 512 KiB of guest memory, whatever the page size (QEMU: MULTIFD_PACKET_SIZE).
MULTIFD_PACKET_PAGES_BYTES = 512 << 10

# Compressed, the worst cases of zlib and zstd are 0.4 % more; twice the plain size cannot be exceeded.
MULTIFD_PAYLOAD_BYTES_MAX = 2 * MULTIFD_PACKET_PAGES_BYTES

# The window that a zstd stream may ask memory for: 32 MiB, what level 20 takes, QEMU's highest (default: level 1).
ZSTD_WINDOW_BITS_MAX = 25

# --- this codec -----------------------------------------------------------------------------------------------

# What is handed out in one piece of bytes that are not looked at (bitmaps, gaps of a mapped-ram file): large
# enough to cost nothing, small enough to be written or compared at once.
PIECE_BYTES_MAX = 1 << 20
