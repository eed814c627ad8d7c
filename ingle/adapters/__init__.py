"""Adapters: attaching, training aids, merging, and files in PEFT's layout."""

from ingle.adapters.adalora import RankAllocator, make_allocator, with_steps
from ingle.adapters.adapted import AttachReport, NotAdapted, lora_modules, trainable_parameters
from ingle.adapters.attachment import attach, count_parameters, initialize, insert
from ingle.adapters.fusion import FusionReport, enable_fused, fuse, insert_fused
from ingle.adapters.identity import BaseIdentity, describe, identify, initial_digest
from ingle.adapters.initialization import principal_directions
from ingle.adapters.kinds import require_shardable, select
from ingle.adapters.lora import LoraLinear, generator_of
from ingle.adapters.merging import merged_planes, merged_weight
from ingle.adapters.norms import update_norms
from ingle.adapters.peft_files import load_adapter, save_adapter
from ingle.adapters.peft_sections import adapter_config
from ingle.adapters.peft_tensors import Record, read_record
from ingle.adapters.prefix import give_keys
from ingle.adapters.prompt import give_text
from ingle.adapters.roles import RoleShape, add_role, base_of, fits_role, load_role, read_shape, save_role
from ingle.adapters.rounding import Rounding
from ingle.adapters.states import Adapted, AdapterState, adapted_modules, as_now, disabled, has_initial, use
from ingle.adapters.targets import Selection

__all__ = [
    "Adapted",
    "AdapterState",
    "AttachReport",
    "BaseIdentity",
    "FusionReport",
    "LoraLinear",
    "NotAdapted",
    "RankAllocator",
    "Record",
    "RoleShape",
    "Rounding",
    "Selection",
    "adapted_modules",
    "adapter_config",
    "add_role",
    "as_now",
    "attach",
    "base_of",
    "count_parameters",
    "describe",
    "disabled",
    "enable_fused",
    "fits_role",
    "fuse",
    "generator_of",
    "give_keys",
    "give_text",
    "has_initial",
    "identify",
    "initial_digest",
    "initialize",
    "insert",
    "insert_fused",
    "load_adapter",
    "load_role",
    "lora_modules",
    "make_allocator",
    "merged_planes",
    "merged_weight",
    "principal_directions",
    "read_record",
    "read_shape",
    "require_shardable",
    "save_adapter",
    "save_role",
    "select",
    "trainable_parameters",
    "update_norms",
    "use",
    "with_steps",
]
