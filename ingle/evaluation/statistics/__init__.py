"""Significance tests and confidence intervals of scores, and the choice between them for each metric.

Every simulation draws *multiplicities*: how often each sample counts. So one mechanism serves functions of sums and
functions of ranks. Samples that belong together (questions about one text) are drawn together, as a group.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: Turns how often each sample counts, float64 [R, S], into the scores [R] of these resamples.
Replicate = Callable[[Floats], Floats]

#: The group of each sample, int64 [S], from 0 to the number of groups - 1.
Groups = npt.NDArray[np.int64]

__all__ = ["Floats", "Groups", "Replicate"]
