"""VMs as people write them and as QEMU gets them: specs, command lines, processes, host probes."""
