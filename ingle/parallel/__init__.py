"""Devices and ranks of a run; the only package that may use ``torch.distributed``."""

from ingle.parallel.activation_offload import ActivationOffload, offload_activations
from ingle.parallel.agreement import check_processes, local_first, require_launcher, require_same, require_visible
from ingle.parallel.gathering import (
    all_gathered,
    call_inside,
    call_outside_step,
    complete_parameters,
    each_gathered,
    gathered,
    is_unit,
    trained_parameters,
)
from ingle.parallel.gradients import add_over_ranks, reduce_in_backward, sum_gradients, total_norm
from ingle.parallel.handout import Handout, adopt_allocated, allocated, same_rows
from ingle.parallel.mesh import Mesh, join, leave, pick_device, set_up, start
from ingle.parallel.reporting import RankSink
from ingle.parallel.shards import copy_rows, full, is_sharded, local, local_rows, rows_of, with_local
from ingle.parallel.wrapping import (
    compute_device,
    require_sharded_base,
    reset_after_error,
    shards,
    skip_in_backward,
    wrap,
)

__all__ = [
    "ActivationOffload",
    "Handout",
    "Mesh",
    "RankSink",
    "add_over_ranks",
    "adopt_allocated",
    "all_gathered",
    "allocated",
    "call_inside",
    "call_outside_step",
    "check_processes",
    "complete_parameters",
    "compute_device",
    "copy_rows",
    "each_gathered",
    "full",
    "gathered",
    "is_sharded",
    "is_unit",
    "join",
    "leave",
    "local",
    "local_first",
    "local_rows",
    "offload_activations",
    "pick_device",
    "reduce_in_backward",
    "require_launcher",
    "require_same",
    "require_sharded_base",
    "require_visible",
    "reset_after_error",
    "rows_of",
    "same_rows",
    "set_up",
    "shards",
    "skip_in_backward",
    "start",
    "sum_gradients",
    "total_norm",
    "trained_parameters",
    "with_local",
    "wrap",
]
