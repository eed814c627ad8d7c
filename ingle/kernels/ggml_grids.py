"""The grids of GGUF's IQ1 to IQ3 formats: the rows of small integers that their codes name.

The tables belong to the formats' definition; the ``gguf`` package holds them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray


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
