/*
 * The memory thread: one thread owns both regions, so that writing and checking never race.
 *
 * Region A is rewritten in order, again and again; pass p writes generation p. With the write cursor at page
 * c, pages below c have generation `pass` and the others `pass - 1`. Region B keeps generation 0 for ever.
 * Before a page is rewritten, four of its words are checked: else the rewriting would hide a lost page.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "watcher.h"

#define PAGES_PER_MIB (1024 * 1024 / PAGE_BYTES)
#define SLOT_US 5000ull          /* the work of one second is spread over slots of this length */
#define MAX_DEBT_US 50000ull     /* time that the guest did not get is forgiven beyond this */
#define SALT_A 0xa11ce0000000000aull
#define SALT_B 0xb0b000000000000bull

static uint64_t *region_a, *region_b;
static uint64_t pages_a, pages_b, write_cursor, walk_cursor, walks;
static uint64_t pass = 1;        /* everything has been written as generation 0 before pass 1 starts */

static uint64_t *map_region(uint64_t pages, uint64_t salt)
{
    uint64_t *region = mmap(0, (pages ? pages : 1) * PAGE_BYTES, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (region == MAP_FAILED) {
        complain("memory map failed errno=%d pages=%lu", errno, (unsigned long)pages);
        return 0;
    }
    for (uint64_t page = 0; page < pages; page++)
        cell_fill(region + page * PAGE_WORDS, salt, page, 0);
    return region;
}

static uint64_t generation_a(uint64_t page)
{
    return page < write_cursor ? pass : pass - 1;
}

static void report(char region, uint64_t *cell, uint64_t salt, uint64_t page, uint64_t generation, int word)
{
    complain("memory region=%c page=%lu word=%d want=%lx got=%lx generation=%lu", region, (unsigned long)page,
             word, (unsigned long)cell_word(word, salt, page, generation), (unsigned long)cell[word],
             (unsigned long)generation);
    cell_fill(cell, salt, page, generation);
}

static void check_page(char region, uint64_t *base, uint64_t salt, uint64_t page, uint64_t generation)
{
    uint64_t *cell = base + page * PAGE_WORDS;
    int word = cell_mismatch(cell, salt, page, generation);
    if (word >= 0)
        report(region, cell, salt, page, generation, word);
}

static void dirty_one_page(void)
{
    static const int samples[] = {0, 1, 170, PAGE_WORDS - 1};
    uint64_t *cell = region_a + write_cursor * PAGE_WORDS;
    for (unsigned i = 0; i < sizeof samples / sizeof *samples; i++)
        if (cell[samples[i]] != cell_word(samples[i], SALT_A, write_cursor, pass - 1)) {
            report('a', cell, SALT_A, write_cursor, pass - 1, samples[i]);
            break;
        }
    cell_fill(cell, SALT_A, write_cursor, pass);
    dirtied_pages++;
    if (++write_cursor == pages_a) {
        write_cursor = 0;
        pass++;
    }
}

static void walk_one_page(void)
{
    if (walk_cursor < pages_a)
        check_page('a', region_a, SALT_A, walk_cursor, generation_a(walk_cursor));
    else
        check_page('b', region_b, SALT_B, walk_cursor - pages_a, 0);
    if (++walk_cursor == pages_a + pages_b) {
        walk_cursor = 0;
        say("W memory %lu", (unsigned long)++walks);
    }
}

/* Pages that are due after `elapsed_us` at the given rate, less what has been done already. */
static uint64_t due_pages(long mib_per_s, uint64_t elapsed_us, uint64_t done)
{
    uint64_t due = (uint64_t)mib_per_s * PAGES_PER_MIB * elapsed_us / US_PER_S;
    return due > done ? due - done : 0;
}

void *memory_thread(void *unused)
{
    pages_a = (uint64_t)options.ram_mib * PAGES_PER_MIB;
    pages_b = (uint64_t)options.const_mib * PAGES_PER_MIB;
    region_a = map_region(pages_a, SALT_A);
    region_b = map_region(pages_b, SALT_B);
    if (!region_a || !region_b || pages_a + pages_b == 0)
        return unused;
    say("W memory 0");
    uint64_t started_us = now_us(), deadline_us = started_us, dirtied = 0, walked = 0;
    int damaged = 0;
    for (;;) {
        deadline_us += SLOT_US;
        sleep_until_us(deadline_us);
        uint64_t now = now_us();
        if (now > deadline_us + MAX_DEBT_US) {   /* we were not run: forgive the time, not the content */
            started_us += now - deadline_us;
            deadline_us = now;
        }
        uint64_t elapsed_us = deadline_us - started_us;
        uint64_t due = pages_a ? due_pages(options.dirty_mib_per_s, elapsed_us, dirtied) : 0;
        for (uint64_t i = 0; i < due; i++)
            dirty_one_page();
        dirtied += due;
        due = due_pages(options.check_mib_per_s, elapsed_us, walked);
        for (uint64_t i = 0; i < due; i++)
            walk_one_page();
        walked += due;
        if (options.fault_after_s && !damaged && elapsed_us > (uint64_t)options.fault_after_s * US_PER_S) {
            region_b[PAGE_WORDS + 100] ^= 1;
            damaged = 1;
        }
    }
}
