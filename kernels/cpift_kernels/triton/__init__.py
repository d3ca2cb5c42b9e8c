"""Triton kernels and their launchers, one module per operation; imported only when the Triton backend runs."""
