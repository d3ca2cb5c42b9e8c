"""The Triton kernels without a GPU: interpreted, compiled offline, and executed as PTX on the CPU."""
