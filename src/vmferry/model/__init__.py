"""The model checker: all interleavings of the functions that decide, in a world of two agents and two QEMUs."""
