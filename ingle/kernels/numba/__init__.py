"""Building blocks of the numba kernels: scalars, vectors, look-up tables and the cache of compiled code."""
