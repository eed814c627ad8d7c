"""The mixes of GGUF files, which hold each matrix in a format of its own, as sections of ``base:``."""

from __future__ import annotations

from typing import ClassVar, Literal

from ingle.config.section import Section


class MixBase(Section):
    """A mix of llama.cpp: most matrices in one of GGUF's formats, those that lose most by it in a wider one.

    Which matrix gets which depends on the model, and a matrix whose rows are not whole blocks gets another format.

    Source: llama.cpp, ``llama_tensor_get_type``.

    Attributes:
        mean_bits: Bits a weight takes on average in a model of the shape of Llama-2-7B.
    """

    format: str
    mean_bits: ClassVar[float]

    def bits_per_weight(self, in_features: int, *, dtype_bits: int = 16) -> float:
        """Bits one weight takes on average, scales included; the exact number depends on the model."""
        return self.mean_bits


class Q3_K_SBase(MixBase):
    """llama.cpp's Q3_K_S: Q3_K everywhere."""

    format: Literal["q3_k_s"]
    mean_bits = 3.44


class Q3_K_MBase(MixBase):
    """llama.cpp's Q3_K_M: Q3_K, with Q4_K and Q5_K for values, outputs of attention and ``down_proj``."""

    format: Literal["q3_k_m"]
    mean_bits = 3.87


class Q3_K_LBase(MixBase):
    """llama.cpp's Q3_K_L: Q3_K, with Q5_K for values, outputs of attention and ``down_proj``."""

    format: Literal["q3_k_l"]
    mean_bits = 4.24


class Q4_K_SBase(MixBase):
    """llama.cpp's Q4_K_S: Q4_K, with Q5_K for values and ``down_proj`` of the first layers."""

    format: Literal["q4_k_s"]
    mean_bits = 4.54


class Q4_K_MBase(MixBase):
    """llama.cpp's Q4_K_M: Q4_K, with Q6_K for values and ``down_proj`` of every other layer."""

    format: Literal["q4_k_m"]
    mean_bits = 4.82


class Q5_K_SBase(MixBase):
    """llama.cpp's Q5_K_S: Q5_K everywhere."""

    format: Literal["q5_k_s"]
    mean_bits = 5.5


class Q5_K_MBase(MixBase):
    """llama.cpp's Q5_K_M: Q5_K, with Q6_K for values and ``down_proj`` of every other layer."""

    format: Literal["q5_k_m"]
    mean_bits = 5.66
