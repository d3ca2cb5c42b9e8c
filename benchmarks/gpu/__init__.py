"""What ten minutes on a GPU should ask first: `make gpu-check`, or `python -m benchmarks.gpu --help`."""
