"""Which devices take part in a run; the one door to ``torch.distributed``."""

from ingle.parallel.mesh import Mesh, start

__all__ = ["Mesh", "start"]
