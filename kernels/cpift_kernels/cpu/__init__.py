"""The CPU path: numba kernels on 32-lane vectors, one module per operation, called by the root modules."""
