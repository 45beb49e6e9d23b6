"""Quantizers: one file a method, one contract (`base.py`). Importing this package registers them all."""

from ibq.quantizers.base import Quantized, Quantizer, QuantizerConfig, build_quantizer
from ibq.quantizers.ibq import IBQConfig, IndexBackpropQuantizer
from ibq.quantizers.vq import VectorQuantizer, VQConfig

__all__ = [
    "IBQConfig",
    "IndexBackpropQuantizer",
    "Quantized",
    "Quantizer",
    "QuantizerConfig",
    "VQConfig",
    "VectorQuantizer",
    "build_quantizer",
]
