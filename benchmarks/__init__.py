"""What cpift takes and whether it keeps its promises. From the root: `python -m benchmarks.kernels.speed --help`.

kernels/: their speed beside what the memory gives, and what the compiler makes of them for GPUs. gpu/:
what to ask a GPU first. merging/: beside
mergekit, and real adapters. training/: what Ray Train and freezing cost. kills/: parts of a run killed while they work.
demo/: the demo's learning rates and its sweep. study/: does CPI-FT pay? record.py appends the rows of results/.
"""
