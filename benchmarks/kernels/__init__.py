"""The kernels: seconds beside the read ceiling and rivals, and what is compiled for GPUs that need not be there."""
