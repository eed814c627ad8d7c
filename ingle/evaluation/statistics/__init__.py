"""Significance tests and confidence intervals of scores, and the choice between them for each metric."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: Turns summed sufficient statistics [..., K] into scores [...].
Aggregate = Callable[[Floats], Floats]

__all__ = ["Aggregate", "Floats"]
