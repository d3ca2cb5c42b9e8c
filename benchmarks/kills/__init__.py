"""Runs, fusions and sweeps whose parts are killed while they work, and the bytes that they end with."""
