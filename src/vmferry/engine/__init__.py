"""MOVES bytes: vmferry's own ends of QEMU's migration stream. Threads, sockets, bounded everything."""
