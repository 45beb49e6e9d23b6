"""Index Backpropagation Quantization and the quantizers it is compared with (arXiv 2412.02692)."""

from ibq.models.tokenizer import Tokenizer, load_tokenizer
from ibq.ops import index_backprop
from ibq.pretrained.released import TrainedTransformer, load_released
from ibq.pretrained.transformer import load_transformer
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

__version__ = "0.1.0"

__all__ = [
    "BSQConfig",
    "BinarySphericalQuantizer",
    "FSQConfig",
    "FiniteScalarQuantizer",
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
    "TrainedTransformer",
    "VQConfig",
    "VectorQuantizer",
    "build_quantizer",
    "index_backprop",
    "load_released",
    "load_tokenizer",
    "load_transformer",
]
