/*
 * A guest that works a little, for the size of a second snapshot: `rdinit=/worker` beside the watcher.
 *
 * It maps every file below /m (they are the guest's page cache), chooses `work_pages` of their pages by chance, and
 * rewrites `work_bytes` bytes in each of them, all within `work_seconds`, again and again: the same pages, the same
 * places, other values. The three numbers are on the kernel's command line, which hands them on as the environment.
 * The other process becomes /init, as if nothing had been.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <ftw.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define PAGE_BYTES 4096

static unsigned char **pages;
static size_t page_count, page_room;
static uint64_t chance = 88172645463325252ull;

static uint64_t next_chance(void)
{
    chance ^= chance << 13;
    chance ^= chance >> 7;
    chance ^= chance << 17;
    return chance;
}

/* Where the k-th byte of the i-th page is: by chance, and always there (so that a few places may be one). */
static size_t place(uint64_t i, uint64_t k)
{
    uint64_t mixed = (i << 20 | k) * 0x9e3779b97f4a7c15ull;
    mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9ull;
    return (mixed ^ mixed >> 27) % PAGE_BYTES;
}

static int map_file(const char *path, const struct stat *about, int kind, struct FTW *where)
{
    (void)where;
    size_t whole = kind == FTW_F ? (size_t)about->st_size / PAGE_BYTES : 0;
    int fd = whole ? open(path, O_RDWR) : -1;
    if (fd < 0)
        return 0;
    unsigned char *data = mmap(0, whole * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (data == MAP_FAILED)
        return 0;
    if (page_count + whole > page_room) {
        page_room = 2 * (page_count + whole);
        pages = realloc(pages, page_room * sizeof *pages);
        if (!pages)
            return 1;
    }
    for (size_t i = 0; i < whole; i++)
        pages[page_count++] = data + i * PAGE_BYTES;
    return 0;
}

static size_t number(const char *name)
{
    const char *text = getenv(name);
    return text ? strtoul(text, 0, 10) : 0;
}

static void work(void)
{
    size_t count = number("work_pages"), bytes = number("work_bytes"), seconds = number("work_seconds");
    if (nftw("/m", map_file, 16, FTW_PHYS) || !page_count || !count || !seconds)
        _exit(1);
    if (count > page_count)
        count = page_count;
    for (size_t i = 0; i < count; i++) {          /* the first `count` of a shuffle */
        size_t other = i + next_chance() % (page_count - i);
        unsigned char *page = pages[other];
        pages[other] = pages[i];
        pages[i] = page;
    }
    for (;;)
        for (size_t i = 0; i < count; i++) {
            for (uint64_t k = 0; k < bytes; k++)
                pages[i][place(i, k)] = (unsigned char)next_chance();
            usleep(seconds * 1000000 / count);
        }
}

int main(void)
{
    char *nothing[] = {"/init", 0};
    if (fork() == 0)
        work();
    execv("/init", nothing);
    return 1;
}
