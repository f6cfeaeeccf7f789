"""KEEPS snapshots: backends that hold objects, and the repository of pages in them. Knows nothing of QEMU."""
