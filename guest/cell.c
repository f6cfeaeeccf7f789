/* The content of one page or block, as a function of where it is and how often it has been written. */
#include "watcher.h"

#define HEADER_WORDS 4
#define STEP 0x9e3779b97f4a7c15ull

static uint64_t mix(uint64_t x)
{
    x ^= x >> 31;
    x *= 0xbf58476d1ce4e5b9ull;
    x ^= x >> 29;
    x *= 0x94d049bb133111ebull;
    return x ^ (x >> 32);
}

static uint64_t payload_start(uint64_t salt, uint64_t place, uint64_t generation)
{
    return mix(salt ^ mix(place * STEP ^ mix(generation)));
}

/* Sum of all payload words, in closed form: start + STEP*i for i in HEADER_WORDS..PAGE_WORDS-1. */
static uint64_t payload_sum(uint64_t start)
{
    const uint64_t count = PAGE_WORDS - HEADER_WORDS;
    return start * count + STEP * ((HEADER_WORDS + PAGE_WORDS - 1) * count / 2);
}

uint64_t cell_word(int word, uint64_t salt, uint64_t place, uint64_t generation)
{
    uint64_t start = payload_start(salt, place, generation);
    switch (word) {
    case 0:
        return place;
    case 1:
        return generation;
    case 2:
        return payload_sum(start);
    case 3:
        return salt;
    default:
        return start + STEP * (uint64_t)word;
    }
}

void cell_fill(uint64_t *cell, uint64_t salt, uint64_t place, uint64_t generation)
{
    uint64_t start = payload_start(salt, place, generation);
    uint64_t value = start + STEP * HEADER_WORDS;
    cell[0] = place;
    cell[1] = generation;
    cell[2] = payload_sum(start);
    cell[3] = salt;
    for (int word = HEADER_WORDS; word < PAGE_WORDS; word++, value += STEP)
        cell[word] = value;
}

int cell_mismatch(const uint64_t *cell, uint64_t salt, uint64_t place, uint64_t generation)
{
    uint64_t start = payload_start(salt, place, generation);
    uint64_t value = start + STEP * HEADER_WORDS;
    if (cell[0] != place)
        return 0;
    if (cell[1] != generation)
        return 1;
    if (cell[2] != payload_sum(start))
        return 2;
    if (cell[3] != salt)
        return 3;
    for (int word = HEADER_WORDS; word < PAGE_WORDS; word++, value += STEP)
        if (cell[word] != value)
            return word;
    return -1;
}
