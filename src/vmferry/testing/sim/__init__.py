"""The simulator: real agents on a clock, a net and QEMUs that are values. See `run`."""
