"""Devices and ranks of a run; the only package that may use ``torch.distributed``."""

from ingle.parallel.mesh import Mesh, pick_device, start

__all__ = ["Mesh", "pick_device", "start"]
