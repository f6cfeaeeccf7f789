/* Loads the drivers of the devices that are really there: every module that is not loaded saves boot time. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "watcher.h"

#define VIRTIO_PCI_VENDOR 0x1af4

static void load(const char *module)
{
    char path[64];
    snprintf(path, sizeof path, "/modules/%s.ko", module);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) {
        complain("guest module %s is not in the initramfs", module);
        return;
    }
    if (syscall(SYS_finit_module, file, "", 0) != 0 && errno != EEXIST)
        complain("guest module %s errno=%d", module, errno);
    close(file);
}

static unsigned read_id(const char *device, const char *field)
{
    char path[320];
    unsigned id = 0;
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/%s", device, field);
    FILE *file = fopen(path, "re");
    if (!file)
        return 0;
    if (fscanf(file, "%x", &id) != 1)
        id = 0;
    fclose(file);
    return id;
}

/* The virtio device type (1 = net, 2 = block, ...) of a PCI device, or 0. */
static unsigned virtio_type(const char *device)
{
    if (read_id(device, "vendor") != VIRTIO_PCI_VENDOR)
        return 0;
    unsigned id = read_id(device, "device");
    if (id >= 0x1040)
        return id - 0x1040;
    return id >= 0x1000 ? read_id(device, "subsystem_device") : 0;
}

void load_drivers(void)
{
    unsigned seen = 0;   /* bit n: a device of virtio type n exists */
    DIR *devices = opendir("/sys/bus/pci/devices");
    struct dirent *entry;
    while (devices && (entry = readdir(devices)))
        if (entry->d_name[0] != '.') {
            unsigned type = virtio_type(entry->d_name);
            if (type && type < 32)
                seen |= 1u << type;
        }
    if (devices)
        closedir(devices);
    if (!seen)
        return;
    static const char *const base[] = {"virtio_ring", "virtio", "virtio_pci_modern_dev",
                                       "virtio_pci_legacy_dev", "virtio_pci"};
    for (unsigned i = 0; i < sizeof base / sizeof *base; i++)
        load(base[i]);
    if (seen & 1u << 1) {
        load("failover");
        load("net_failover");
        load("virtio_net");
    }
    if (seen & 1u << 2)
        load("virtio_blk");
    if (seen & 1u << 4)
        load("virtio-rng");
    if (seen & 1u << 5)
        load("virtio_balloon");
}
