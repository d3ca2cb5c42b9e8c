"""Order statistics of non-negative int32 keys, ties to the earlier ones.

In linear time whatever the ties, unlike numpy's partition, and without the GIL: under it the tasks' small steps would
wait for each other.
"""

from __future__ import annotations

import numpy as np

from .compiled import inner, kernel


@kernel
def kth_largest(keys, count):  # type: ignore[no-untyped-def]
    """(the count-th largest key, how many of its equals are among the count largest); radix 2**11 on their range.

    count: 1..len(keys), or 0, which gives (the largest key + 1, 0).
    """
    histogram = np.empty((4, 1 << 11), np.int64)  # four, since an increment waits for the one before it in its place
    least, most = np.int64(keys.min()), np.int64(keys.max())
    bits, prefix, rest = 0, 0, count
    if count == 0:
        return most + 1, 0
    while (most - least) >> bits:
        bits += 1
    while bits > 0:
        shift = max(bits - 11, 0)
        digit = (1 << (bits - shift)) - 1
        histogram[:] = 0
        for i in range(len(keys)):
            offset = keys[i] - least
            if offset >> bits == prefix:
                histogram[i & 3, (offset >> shift) & digit] += 1
        while histogram[:, digit].sum() < rest:
            rest -= histogram[:, digit].sum()
            digit -= 1
        prefix, bits = prefix << (bits - shift) | digit, shift
    return least + prefix, rest


@inner
def point(keys, count):  # type: ignore[no-untyped-def]
    """(the count-th largest key, where it is), count in 1..len(keys)."""
    key, ties = kth_largest(keys, count)
    for i in range(len(keys)):
        ties -= keys[i] == key
        if ties == 0 and keys[i] == key:
            return key, i
    return key, -1
