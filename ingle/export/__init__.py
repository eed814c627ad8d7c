"""Taking what was trained to where it is served: adapters, safetensors and GGUF, with proof of what they answer."""

from ingle.export.entry import export
from ingle.export.request import Target

__all__ = ["Target", "export"]
