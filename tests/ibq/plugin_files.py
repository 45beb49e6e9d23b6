"""A quantizer of one's own as the text of a file, whole or with a fault."""

from __future__ import annotations

from pathlib import Path

SOURCE = """\
from typing import Literal

import torch
from torch import nn

from ibq.quantizers.base import CodebookQuantizer, Quantized, quantization_terms, straight_through
from ibq.quantizers.config import CodebookConfig


class MineConfig(CodebookConfig):
    method: Literal["mine"] = "mine"
    # config


class MineQuantizer(CodebookQuantizer, config=MineConfig):
    # class

    def quantize(self, z_ND):
        codebook_KD = self.codebook
        # before
        indices_N = torch.cdist(z_ND, codebook_KD).argmin(1)
        codes_ND = codebook_KD[indices_N]
        z_q_ND, losses = straight_through(z_ND, codes_ND), quantization_terms(z_ND, codes_ND)
        # after
        return z_q_ND, indices_N, losses
"""


def source(method: str = "mine", **added: str) -> str:
    """SOURCE with lines in place of its comments `config`, `class`, `before`, `after`."""
    text = SOURCE.replace('"mine"', f'"{method}"')
    for place, lines in added.items():
        text = text.replace(f"# {place}", lines)
    return text


def write(folder: Path, name: str = "mine.py", text: str = SOURCE) -> Path:
    path = folder / name
    path.write_text(text)
    return path
