/*
 * watcher: the only process of the test guest. It is PID 1 and never ends.
 *
 * Theory of operation
 * -------------------
 * The guest is the judge of a migration that nobody can bribe: it notices from inside when memory, disk or
 * time are not what they were. Three threads:
 *
 *   ticker  (SCHED_FIFO)  prints one numbered line on ttyS0 every tick_ms      watcher.c
 *   memory                rewrites pages at a given rate and checks all pages   memory.c
 *   disk                  writes numbered blocks, reads them back and compares  disk.c
 *
 * What a cell (page or block) must contain follows from its place and its generation alone, and each thread
 * remembers the generation of every one of its cells. So not only damaged content is found but also *old*
 * content that is in itself intact: a page or block which was lost on the way.
 *
 * Serial lines (each ends with '\n' and is written in one piece; the last field is the sum of all bytes
 * before it, modulo 256, in hex, so that a torn or mixed line cannot pass for a good one):
 *
 *   READY <version> <boot id> <options...> <sum>   once, before the first tick
 *   T <seq> <guest CLOCK_MONOTONIC in us> <errors so far> <sum>
 *   W memory <walks> <sum>                         every page of both regions has been checked once more
 *   W disk <walks> <sum>                           every written block has been read back once more
 *   S <dirtied pages> <written blocks> <worst lateness of a tick in us> <sum>     once per second
 *   E memory <what> ... <sum>, E disk <what> ... <sum>, E guest <what> ... <sum>   at once, when found
 *
 * Rule 1: seq grows by exactly one from tick to tick, whatever happens. A late tick is late; it is not
 *         skipped in the numbers and never made up for by a burst.
 * Rule 2: each damaged cell is reported once, repaired, and stays in the count of errors for ever.
 * Rule 3: no thread waits for another one, except for the serial port.
 */
#ifndef WATCHER_H
#define WATCHER_H

#include <stdint.h>

#define WATCHER_VERSION "1"
#define PAGE_BYTES 4096
#define PAGE_WORDS (PAGE_BYTES / 8)
#define US_PER_S 1000000ull

struct options {
    long tick_ms;           /* time between ticks */
    long ram_mib;           /* size of the region that is rewritten and checked */
    long const_mib;         /* size of the region that is written once and checked for ever */
    long dirty_mib_per_s;   /* how fast the first region is rewritten; 0 = never */
    long check_mib_per_s;   /* how fast both regions are walked and compared */
    char disk[32];          /* device name below /dev, "" = no disk */
    long disk_write_ms;     /* time between written blocks */
    long disk_blocks;       /* length of the ring of blocks */
    long disk_offset_mib;   /* where on the disk the ring starts */
    long fault_after_s;     /* self-test of the tests: damage one own page then; 0 = never */
};

extern struct options options;
extern _Atomic uint64_t errors_total, dirtied_pages, written_blocks;

/* Prints one line and adds the sum. Safe from every thread. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Prints "E <what>" and counts it; only the first 40 are printed, all are counted. */
void complain(const char *format, ...) __attribute__((format(printf, 1, 2)));
uint64_t now_us(void);
/* Sleeps until now_us() >= deadline_us. */
void sleep_until_us(uint64_t deadline_us);

/* The content of a cell: words 0..3 are place, generation, sum and salt; the others follow from these. */
void cell_fill(uint64_t *cell, uint64_t salt, uint64_t place, uint64_t generation);
/* Index of the first word that is not as cell_fill() makes it, or -1. */
int cell_mismatch(const uint64_t *cell, uint64_t salt, uint64_t place, uint64_t generation);
/* What the given word of a cell must be. */
uint64_t cell_word(int word, uint64_t salt, uint64_t place, uint64_t generation);

void *memory_thread(void *unused);
void *disk_thread(void *unused);
void load_drivers(void);

#endif
