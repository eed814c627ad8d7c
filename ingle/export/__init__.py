"""Exports trained models and quantizes models: adapters, safetensors and GGUF, verified by other programs."""

from ingle.export.entry import ExportResult, export
from ingle.export.quantization import QuantizationResult, quantize
from ingle.export.request import Target

__all__ = ["ExportResult", "QuantizationResult", "Target", "export", "quantize"]
