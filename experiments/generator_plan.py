"""What a generator's recipe would cost: sizes, schedule, memory by formulas that are shown, compute counted, and hours at an assumed share
of a GPU's peak: of generators nothing has been measured.

Suffixes: B images, N tokens, S positions, W width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from experiments import recipe_plan
from ibq.generator_config import GeneratorConfig
from ibq.imagenet import IMAGENET_IMAGES
from ibq.models.autoencoder import Encoder
from ibq.models.transformer import Transformer, rotation_table

CARD, BF16_PEAK, FP32_PEAK = "H100", 989e12, 67e12
"""FLOP/s that the maker states of an H100 SXM: dense bfloat16, and float32 without TF32."""
ASSUMED = 0.4
"""Share of the peak that the hours assume."""

