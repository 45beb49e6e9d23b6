"""Quantizers: one file a method, one contract (`base.py`). Importing this package registers them all."""

from ibq.quantizers.base import Quantized, Quantizer
from ibq.quantizers.bsq import BinarySphericalQuantizer, BSQConfig
from ibq.quantizers.build import build_quantizer, parse_quantizer_config
from ibq.quantizers.diveq import DiVeQConfig, DiVeQQuantizer
from ibq.quantizers.fsq import FiniteScalarQuantizer, FSQConfig
from ibq.quantizers.grouped import GroupedConfig, GroupedQuantizer
from ibq.quantizers.gumbel import GumbelConfig, GumbelQuantizer
from ibq.quantizers.ibq import IBQConfig, IndexBackpropQuantizer
from ibq.quantizers.lfq import LFQConfig, LookupFreeQuantizer
from ibq.quantizers.nsvq import NonStationaryQuantizer, NSVQConfig
from ibq.quantizers.optvq import OptimalTransportQuantizer, OptVQConfig
from ibq.quantizers.simvq import SimVectorQuantizer, SimVQConfig
from ibq.quantizers.spherical import SphericalConfig, SphericalQuantizer
from ibq.quantizers.vq import VectorQuantizer, VQConfig
from ibq.quantizers.vqbridge import VQBridgeConfig, VQBridgeQuantizer
from ibq.quantizers.wasserstein import WassersteinConfig, WassersteinQuantizer
from ibq.schema import QuantizerConfig

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
    "Quantizer",
    "QuantizerConfig",
    "SimVQConfig",
    "SimVectorQuantizer",
    "SphericalConfig",
    "SphericalQuantizer",
    "VQBridgeConfig",
    "VQBridgeQuantizer",
    "VQConfig",
    "VectorQuantizer",
    "WassersteinConfig",
    "WassersteinQuantizer",
    "build_quantizer",
    "parse_quantizer_config",
]
