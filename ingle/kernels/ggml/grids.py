"""What the codes of GGUF's formats name: levels, and for IQ1 to IQ3 the rows of a grid.

The tables belong to the formats' definition; the grids are those of the ``gguf`` package.
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
    """The rows of a format's grid, ``[codes, weights of a row]``.

    Args:
        name: As ``base.format`` calls the format: ``iq1_s``, ``iq1_m``, ``iq2_xxs``, ``iq2_xs``, ``iq2_s``,
            ``iq3_xxs`` or ``iq3_s``.
    """
    from gguf import quants

    kind: Any = getattr(quants, name.upper())
    kind.init_grid()
    grid: NDArray[np.int8] = kind.grid.reshape(kind.grid_shape).astype(np.int8)
    return grid
