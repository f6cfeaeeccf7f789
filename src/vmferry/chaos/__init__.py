"""Faults on purpose, with real QEMUs and real agents; judges that are no part of the product. See `campaign`."""
