"""Building blocks of the numba kernels: vectors, bfloat16 and the cache of compiled code."""
