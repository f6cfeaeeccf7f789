/* The main program: options, serial port, ticks. See watcher.h for the theory of operation. */
#define _GNU_SOURCE
#include "watcher.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define MAX_PRINTED_ERRORS 40

struct options options = {
    .tick_ms = 10, .ram_mib = 32, .const_mib = 8, .check_mib_per_s = 32, .disk_write_ms = 50,
    .disk_blocks = 128, .disk_offset_mib = 1,
};
_Atomic uint64_t errors_total, dirtied_pages, written_blocks;

static int serial = 1;
static pthread_mutex_t serial_mutex;

uint64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * US_PER_S + (uint64_t)now.tv_nsec / 1000;
}

void sleep_until_us(uint64_t deadline_us)
{
    struct timespec until = {(time_t)(deadline_us / US_PER_S), (long)(deadline_us % US_PER_S) * 1000};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, 0) == EINTR)
        ;
}

static void say_va(const char *prefix, const char *format, va_list arguments)
{
    char line[256];
    int length = snprintf(line, sizeof line, "%s", prefix);
    length += vsnprintf(line + length, sizeof line - 8 - (size_t)length, format, arguments);
    if (length > (int)sizeof line - 8)
        length = (int)sizeof line - 8;
    unsigned sum = 0;
    for (int i = 0; i < length; i++)
        sum += (unsigned char)line[i];
    length += snprintf(line + length, 8, " %02x\n", sum & 0xff);
    pthread_mutex_lock(&serial_mutex);
    for (int done = 0; done < length;) {
        ssize_t n = write(serial, line + done, (size_t)(length - done));
        if (n > 0)
            done += (int)n;
        else if (errno != EINTR)
            break;
    }
    pthread_mutex_unlock(&serial_mutex);
}

void say(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    say_va("", format, arguments);
    va_end(arguments);
}

void complain(const char *format, ...)
{
    if (errors_total++ >= MAX_PRINTED_ERRORS)
        return;
    va_list arguments;
    va_start(arguments, format);
    say_va("E ", format, arguments);
    va_end(arguments);
}

static void open_serial(void)
{
    pthread_mutexattr_t attributes;   /* the ticker must not wait behind a thread that is not being run */
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setprotocol(&attributes, PTHREAD_PRIO_INHERIT);
    pthread_mutex_init(&serial_mutex, &attributes);
    struct termios settings;
    serial = open("/dev/ttyS0", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (serial < 0)
        serial = 1;
    if (tcgetattr(serial, &settings) == 0) {
        cfmakeraw(&settings);
        settings.c_cflag |= CLOCAL;
        cfsetspeed(&settings, B115200);
        tcsetattr(serial, TCSANOW, &settings);
    }
}

static void read_number(const char *word, const char *name, long least, long most, long *into)
{
    size_t length = strlen(name);
    if (strncmp(word, name, length) != 0 || word[length] != '=')
        return;
    char *end;
    long value = strtol(word + length + 1, &end, 10);
    if (*end || value < least || value > most)
        complain("guest option %s is not a number from %ld to %ld", word, least, most);
    else
        *into = value;
}

static void read_option(const char *word)
{
    read_number(word, "tick_ms", 1, 10000, &options.tick_ms);
    read_number(word, "ram_mib", 0, 1 << 20, &options.ram_mib);
    read_number(word, "const_mib", 0, 1 << 20, &options.const_mib);
    read_number(word, "dirty_mib_per_s", 0, 1 << 20, &options.dirty_mib_per_s);
    read_number(word, "check_mib_per_s", 0, 1 << 20, &options.check_mib_per_s);
    read_number(word, "disk_write_ms", 1, 60000, &options.disk_write_ms);
    read_number(word, "disk_blocks", 1, 1 << 20, &options.disk_blocks);
    read_number(word, "disk_offset_mib", 0, 1 << 30, &options.disk_offset_mib);
    read_number(word, "fault_after_s", 0, 86400, &options.fault_after_s);
    if (strncmp(word, "disk=", 5) == 0)
        snprintf(options.disk, sizeof options.disk, "%s", word + 5);
}

static void read_line(const char *path, char *into, size_t size)
{
    FILE *file = fopen(path, "re");
    if (!file || !fgets(into, (int)size, file))
        into[0] = 0;
    if (file)
        fclose(file);
    into[strcspn(into, "\n")] = 0;
}

static void read_options(void)
{
    static char line[4096];
    char *rest = line, *word;
    read_line("/proc/cmdline", line, sizeof line);
    while ((word = strsep(&rest, " ")))
        if (strncmp(word, "vmferry.", 8) == 0)
            read_option(word + 8);
}

static void start(void *(*body)(void *))
{
    pthread_t thread;
    if (pthread_create(&thread, 0, body, 0) != 0)
        complain("guest thread errno=%d", errno);
}

static void tick_for_ever(void)
{
    struct sched_param priority = {.sched_priority = 50};
    sched_setscheduler(0, SCHED_FIFO, &priority);
    uint64_t tick_us = (uint64_t)options.tick_ms * 1000, deadline_us = now_us();
    uint64_t next_status_us = deadline_us + US_PER_S, worst_late_us = 0;
    for (uint64_t seq = 1;; seq++) {
        sleep_until_us(deadline_us);
        uint64_t now = now_us(), late_us = now - deadline_us;
        say("T %lu %lu %lu", (unsigned long)seq, (unsigned long)now, (unsigned long)errors_total);
        if (late_us > worst_late_us)
            worst_late_us = late_us;
        if (now >= next_status_us) {
            say("S %lu %lu %lu", (unsigned long)dirtied_pages, (unsigned long)written_blocks,
                (unsigned long)worst_late_us);
            next_status_us = now + US_PER_S;
            worst_late_us = 0;
        }
        deadline_us += tick_us;
        if (deadline_us + tick_us < now)   /* far behind: go on from here, without a burst */
            deadline_us = now + tick_us;
    }
}

int main(void)
{
    char boot_id[64];
    mkdir("/dev", 0755);
    mkdir("/proc", 0755);
    mkdir("/sys", 0755);
    mount("devtmpfs", "/dev", "devtmpfs", 0, 0);
    mount("proc", "/proc", "proc", 0, 0);
    mount("sysfs", "/sys", "sysfs", 0, 0);
    open_serial();
    read_options();
    load_drivers();
    read_line("/proc/sys/kernel/random/boot_id", boot_id, sizeof boot_id);
    say("READY " WATCHER_VERSION " %s tick_ms=%ld ram_mib=%ld const_mib=%ld dirty_mib_per_s=%ld disk=%s", boot_id,
        options.tick_ms, options.ram_mib, options.const_mib, options.dirty_mib_per_s,
        options.disk[0] ? options.disk : "-");
    start(memory_thread);
    if (options.disk[0])
        start(disk_thread);
    tick_for_ever();
}
