"""Index Backpropagation Quantization and the quantizers it is compared with (arXiv 2412.02692)."""

from ibq.generator import Generator, load_generator
from ibq.models.tokenizer import Tokenizer, load_tokenizer
from ibq.ops import index_backprop
from ibq.quantizers import (
    BinarySphericalQuantizer,
    BSQConfig,
    FiniteScalarQuantizer,
    FSQConfig,
    GumbelConfig,
    GumbelQuantizer,
    IBQConfig,
    IndexBackpropQuantizer,
    LFQConfig,
    LookupFreeQuantizer,
    Quantized,
    SimVectorQuantizer,
    SimVQConfig,
    VectorQuantizer,
    VQConfig,
    build_quantizer,
)
from ibq.released import load_released

__version__ = "0.1.0"

__all__ = [
    "BSQConfig",
    "BinarySphericalQuantizer",
    "FSQConfig",
    "FiniteScalarQuantizer",
    "Generator",
    "GumbelConfig",
    "GumbelQuantizer",
    "IBQConfig",
    "IndexBackpropQuantizer",
    "LFQConfig",
    "LookupFreeQuantizer",
    "Quantized",
    "SimVQConfig",
    "SimVectorQuantizer",
    "Tokenizer",
    "VQConfig",
    "VectorQuantizer",
    "build_quantizer",
    "index_backprop",
    "load_generator",
    "load_released",
    "load_tokenizer",
]
