"""What is trained on top of the base: LoRA, modules trained whole, and their files."""

from ingle.adapters.adapted import AttachReport, NotAdapted, disabled, lora_modules, trainable_parameters
from ingle.adapters.attachment import attach
from ingle.adapters.files import adapter_config, load_adapter, save_adapter
from ingle.adapters.fusion import FusionReport, fuse
from ingle.adapters.lora import LoraLinear
from ingle.adapters.targets import Selection, select

__all__ = [
    "AttachReport",
    "FusionReport",
    "LoraLinear",
    "NotAdapted",
    "Selection",
    "adapter_config",
    "attach",
    "disabled",
    "fuse",
    "load_adapter",
    "lora_modules",
    "save_adapter",
    "select",
    "trainable_parameters",
]
