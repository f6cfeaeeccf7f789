"""vmferry live-migrates running QEMU/KVM virtual machines between hosts and never loses one."""

__version__ = "0.1.0"
