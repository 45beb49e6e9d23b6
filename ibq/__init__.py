"""Index Backpropagation Quantization and the quantizers it is compared with (arXiv 2412.02692)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ibq.models.tokenizer import Tokenizer as Tokenizer
    from ibq.models.tokenizer import load_tokenizer as load_tokenizer
    from ibq.ops import index_backprop as index_backprop
    from ibq.pretrained.released import TrainedTransformer as TrainedTransformer
    from ibq.pretrained.released import load_released as load_released
    from ibq.pretrained.transformer import load_transformer as load_transformer
    from ibq.quantizers import BinarySphericalQuantizer as BinarySphericalQuantizer
    from ibq.quantizers import BSQConfig as BSQConfig
    from ibq.quantizers import DiVeQConfig as DiVeQConfig
    from ibq.quantizers import DiVeQQuantizer as DiVeQQuantizer
    from ibq.quantizers import FiniteScalarQuantizer as FiniteScalarQuantizer
    from ibq.quantizers import FSQConfig as FSQConfig
    from ibq.quantizers import GroupedConfig as GroupedConfig
    from ibq.quantizers import GroupedQuantizer as GroupedQuantizer
    from ibq.quantizers import GumbelConfig as GumbelConfig
    from ibq.quantizers import GumbelQuantizer as GumbelQuantizer
    from ibq.quantizers import IBQConfig as IBQConfig
    from ibq.quantizers import IndexBackpropQuantizer as IndexBackpropQuantizer
    from ibq.quantizers import LFQConfig as LFQConfig
    from ibq.quantizers import LookupFreeQuantizer as LookupFreeQuantizer
    from ibq.quantizers import NonStationaryQuantizer as NonStationaryQuantizer
    from ibq.quantizers import NSVQConfig as NSVQConfig
    from ibq.quantizers import OptimalTransportQuantizer as OptimalTransportQuantizer
    from ibq.quantizers import OptVQConfig as OptVQConfig
    from ibq.quantizers import Quantized as Quantized
    from ibq.quantizers import SimVectorQuantizer as SimVectorQuantizer
    from ibq.quantizers import SimVQConfig as SimVQConfig
    from ibq.quantizers import SphericalConfig as SphericalConfig
    from ibq.quantizers import SphericalQuantizer as SphericalQuantizer
    from ibq.quantizers import VectorQuantizer as VectorQuantizer
    from ibq.quantizers import VQBridgeConfig as VQBridgeConfig
    from ibq.quantizers import VQBridgeQuantizer as VQBridgeQuantizer
    from ibq.quantizers import VQConfig as VQConfig
    from ibq.quantizers import WassersteinConfig as WassersteinConfig
    from ibq.quantizers import WassersteinQuantizer as WassersteinQuantizer
    from ibq.quantizers import build_quantizer as build_quantizer

__version__ = "0.1.0"

# Modules are imported at the first use of a name, so that `ibq --help` does without torch, and the quantizers without
# what only metrics need.
_MODULES = {
    "BSQConfig": "ibq.quantizers",
    "BinarySphericalQuantizer": "ibq.quantizers",
    "DiVeQConfig": "ibq.quantizers",
    "DiVeQQuantizer": "ibq.quantizers",
    "FSQConfig": "ibq.quantizers",
    "FiniteScalarQuantizer": "ibq.quantizers",
    "GroupedConfig": "ibq.quantizers",
    "GroupedQuantizer": "ibq.quantizers",
    "GumbelConfig": "ibq.quantizers",
    "GumbelQuantizer": "ibq.quantizers",
    "IBQConfig": "ibq.quantizers",
    "IndexBackpropQuantizer": "ibq.quantizers",
    "LFQConfig": "ibq.quantizers",
    "LookupFreeQuantizer": "ibq.quantizers",
    "NSVQConfig": "ibq.quantizers",
    "NonStationaryQuantizer": "ibq.quantizers",
    "OptVQConfig": "ibq.quantizers",
    "OptimalTransportQuantizer": "ibq.quantizers",
    "Quantized": "ibq.quantizers",
    "SimVQConfig": "ibq.quantizers",
    "SimVectorQuantizer": "ibq.quantizers",
    "SphericalConfig": "ibq.quantizers",
    "SphericalQuantizer": "ibq.quantizers",
    "Tokenizer": "ibq.models.tokenizer",
    "TrainedTransformer": "ibq.pretrained.released",
    "VQBridgeConfig": "ibq.quantizers",
    "VQBridgeQuantizer": "ibq.quantizers",
    "VQConfig": "ibq.quantizers",
    "VectorQuantizer": "ibq.quantizers",
    "WassersteinConfig": "ibq.quantizers",
    "WassersteinQuantizer": "ibq.quantizers",
    "build_quantizer": "ibq.quantizers",
    "index_backprop": "ibq.ops",
    "load_released": "ibq.pretrained.released",
    "load_tokenizer": "ibq.models.tokenizer",
    "load_transformer": "ibq.pretrained.transformer",
}

__all__ = [
    "BSQConfig",
    "BinarySphericalQuantizer",
    "DiVeQConfig",
    "DiVeQQuantizer",
    "FSQConfig",
    "FiniteScalarQuantizer",
    "GroupedConfig",
    "GroupedQuantizer",
    "GumbelConfig",
    "GumbelQuantizer",
    "IBQConfig",
    "IndexBackpropQuantizer",
    "LFQConfig",
    "LookupFreeQuantizer",
    "NSVQConfig",
    "NonStationaryQuantizer",
    "OptVQConfig",
    "OptimalTransportQuantizer",
    "Quantized",
    "SimVQConfig",
    "SimVectorQuantizer",
    "SphericalConfig",
    "SphericalQuantizer",
    "Tokenizer",
    "TrainedTransformer",
    "VQBridgeConfig",
    "VQBridgeQuantizer",
    "VQConfig",
    "VectorQuantizer",
    "WassersteinConfig",
    "WassersteinQuantizer",
    "build_quantizer",
    "index_backprop",
    "load_released",
    "load_tokenizer",
    "load_transformer",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'ibq' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
