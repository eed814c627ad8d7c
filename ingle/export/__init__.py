"""Exports trained models and quantizes models: adapters, safetensors and GGUF, verified by other programs."""

from ingle.export.entry import ExportResult, export
from ingle.export.expansion import ExpansionResult, expand
from ingle.export.quantization import QuantizationResult, quantize
from ingle.export.request import Target

__all__ = ["ExpansionResult", "ExportResult", "QuantizationResult", "Target", "expand", "export", "quantize"]
