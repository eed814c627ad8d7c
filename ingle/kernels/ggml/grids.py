"""The tables of GGUF's formats: the levels that codes select, and the grids of IQ1 to IQ3, whose rows codes select.

The grids come from the ``gguf`` package.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: The 16 levels of IQ4_NL and IQ4_XS.
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
#: Twice the 16 values of a float with a sign, two bits of exponent and one of mantissa: MXFP4 and NVFP4.
FLOATS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@cache
def read_grid(name: str) -> NDArray[np.int8]:
    """Returns the grid of a format, ``[codes, weights of a row]``.

    Args:
        name: As in ``base.format``: ``iq1_s``, ``iq1_m``, ``iq2_xxs``, ``iq2_xs``, ``iq2_s``,
            ``iq3_xxs`` or ``iq3_s``.
    """
    from gguf import quants

    kind: Any = getattr(quants, name.upper())
    kind.init_grid()
    grid: NDArray[np.int8] = kind.grid.reshape(kind.grid_shape).astype(np.int8)
    return grid
