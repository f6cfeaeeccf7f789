/*
 * The disk thread: a ring of numbered blocks, written past the page cache, and read back for ever.
 *
 * Block number n goes to slot n modulo disk_blocks. The RAM remembers which number each slot holds, so a
 * write that the guest saw complete and that a later read does not show is found: after a migration the
 * destination must see all writes that completed on the source. Each block is read back three times: at
 * once, when half of the ring has been written after it, and just before it is overwritten.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "watcher.h"

#define WRITES_PER_SYNC 8
#define NEVER_WRITTEN UINT64_MAX

static int disk = -1;
static uint64_t *written_number;   /* per slot */
static uint64_t salt;              /* differs from boot to boot: blocks of an earlier boot are not ours */
static void *buffer;

static off_t slot_offset(uint64_t slot)
{
    return ((off_t)options.disk_offset_mib << 20) + (off_t)slot * PAGE_BYTES;
}

static int open_disk(void)
{
    char path[64];
    snprintf(path, sizeof path, "/dev/%s", options.disk);
    uint64_t give_up_us = now_us() + 5 * US_PER_S;
    do {   /* the driver was loaded a moment ago; its device node may still be on the way */
        disk = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
        if (disk < 0)
            sleep_until_us(now_us() + 10000);
    } while (disk < 0 && now_us() < give_up_us);
    if (disk < 0)
        complain("disk open %s errno=%d", path, errno);
    return disk >= 0;
}

static void write_block(uint64_t number)
{
    uint64_t slot = number % (uint64_t)options.disk_blocks;
    cell_fill(buffer, salt, slot, number);
    ssize_t done = pwrite(disk, buffer, PAGE_BYTES, slot_offset(slot));
    if (done != PAGE_BYTES) {
        complain("disk write slot=%lu errno=%d", (unsigned long)slot, done < 0 ? errno : 0);
        written_number[slot] = NEVER_WRITTEN;   /* unknown: do not blame a later read for it */
        return;
    }
    written_number[slot] = number;
    written_blocks++;
    if (number % WRITES_PER_SYNC == WRITES_PER_SYNC - 1 && fdatasync(disk) != 0)
        complain("disk sync errno=%d", errno);
}

static void check_slot(uint64_t slot)
{
    uint64_t number = written_number[slot];
    if (number == NEVER_WRITTEN)
        return;
    memset(buffer, 0, PAGE_BYTES);
    ssize_t done = pread(disk, buffer, PAGE_BYTES, slot_offset(slot));
    if (done != PAGE_BYTES) {
        complain("disk read slot=%lu errno=%d", (unsigned long)slot, done < 0 ? errno : 0);
        return;
    }
    int word = cell_mismatch(buffer, salt, slot, number);
    if (word < 0)
        return;
    complain("disk slot=%lu word=%d want=%lx got=%lx number=%lu", (unsigned long)slot, word,
             (unsigned long)cell_word(word, salt, slot, number), (unsigned long)((uint64_t *)buffer)[word],
             (unsigned long)number);
    written_number[slot] = NEVER_WRITTEN;
}

void *disk_thread(void *unused)
{
    uint64_t blocks = (uint64_t)options.disk_blocks, number = 0, walks = 0;
    written_number = malloc(blocks * sizeof *written_number);
    if (!written_number || posix_memalign(&buffer, PAGE_BYTES, PAGE_BYTES) != 0 || !open_disk())
        return unused;
    memset(written_number, 0xff, blocks * sizeof *written_number);   /* NEVER_WRITTEN */
    salt = 0xd15c000000000000ull ^ now_us() ^ (uint64_t)getpid() << 40;
    uint64_t deadline_us = now_us();
    for (;;) {
        deadline_us += (uint64_t)options.disk_write_ms * 1000;
        sleep_until_us(deadline_us);
        if (now_us() > deadline_us + US_PER_S)
            deadline_us = now_us();
        write_block(number);
        check_slot(number % blocks);
        number++;
        check_slot((number + blocks / 2) % blocks);   /* written half a ring ago */
        check_slot(number % blocks);                  /* the oldest, which is overwritten next */
        if (number % blocks == 0)
            say("W disk %lu", (unsigned long)++walks);
    }
}
