"""A tokenizer: encoder, quantizer, decoder; images to indices and back.

Suffixes: B images, C channels, H W pixels in images and the token grid in features and indices, D code dimension.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ibq.config import TrainConfig
from ibq.errors import ConfigError
from ibq.models.autoencoder import Decoder, Encoder
from ibq.models.weights import misfit, unwrapped
from ibq.ops.arguments import integers
from ibq.quantizers import Quantized, build_quantizer
from ibq.run_directory import require_source, save_source, write_json, write_tensors


class Reconstruction(NamedTuple):
    """A forward pass: images (B, C, H, W) as decoded, the features (B, D, h, w) before quantization, and what the
    quantizer returned; without it the features as they are, no indices and no losses."""

    images: torch.Tensor
    features: torch.Tensor
    quantized: Quantized


class Tokenizer(nn.Module):
    """The network that a TrainConfig describes (the training fields are kept with it, as provenance)."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config = config
        channels, resolution = config.data.channels, config.data.resolution
        z_channels, D = config.model.z_channels, config.quantizer.code_dim
        self.encoder = Encoder(config.model, channels, resolution)
        self.decoder = Decoder(config.model, channels, resolution)
        self.quant_conv = nn.Conv2d(z_channels, D, 1)
        self.post_quant_conv = nn.Conv2d(D, z_channels, 1)
        self.quantize = build_quantizer(config.quantizer)

    @property
    def grid(self) -> int:
        """Tokens a side of an image of the config's resolution."""
        return self.config.data.resolution // self.config.model.downsampling

    @property
    def last_layer(self) -> torch.Tensor:
        """The weight of the decoder's last convolution, where the adaptive weight compares gradients."""
        return self.decoder.conv_out.weight

    def features(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Continuous features (B, D, H/f, W/f) of images (B, C, H, W) in [-1, 1], of any floating type; the weights'
        type is computed in.

        Raises:
            ValueError: the images' channels or size do not fit the architecture, or they are not floating.
        """
        channels, f = self.config.data.channels, self.config.model.downsampling
        if (
            images_BCHW.dim() != 4
            or images_BCHW.shape[1] != channels
            or images_BCHW.shape[2] % f
            or images_BCHW.shape[3] % f
        ):
            raise ValueError(
                f"images of shape {tuple(images_BCHW.shape)} do not fit; pass (B, {channels}, H, W) with H and W "
                f"multiples of {f}"
            )
        if not images_BCHW.is_floating_point():
            raise ValueError(f"images of dtype {images_BCHW.dtype} are not floating; pass floats in [-1, 1]")
        z_BDHW: torch.Tensor = self.quant_conv(self.encoder(images_BCHW.to(self.encoder.conv_in.weight.dtype)))
        return z_BDHW

    def encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Indices (B, H/f, W/f) int64 of images (B, C, H, W) in [-1, 1]."""
        quantized: Quantized = self.quantize(self.features(images_BCHW))
        return quantized.indices

    def decode(self, indices_BHW: torch.Tensor) -> torch.Tensor:
        """Images (B, C, f*H, f*W), nominally in [-1, 1], of indices (B, H, W) of any integer type.

        Raises:
            ValueError: indices are not integers, of another shape, or lie outside [0, K).
        """
        indices_BHW = integers("indices", indices_BHW, self.config.quantizer.codebook_size)
        if indices_BHW.dim() != 3:
            raise ValueError(
                f"indices of shape {tuple(indices_BHW.shape)} are not those of images; pass (B, H, W), which is "
                f"(B, {self.grid}, {self.grid}) for images of the config's size"
            )
        return self._decode_codes(self.quantize.indices_to_codes(indices_BHW))

    def forward(self, images_BCHW: torch.Tensor, *, quantize: bool = True) -> Reconstruction:
        """Reconstructions of images; with quantize=False, before late quantization begins, from the features
        themselves."""
        z_BDHW = self.features(images_BCHW)
        no_indices = torch.empty(0, dtype=torch.int64, device=z_BDHW.device)
        quantized = self.quantize(z_BDHW) if quantize else Quantized(z_BDHW, no_indices, {})
        return Reconstruction(self._decode_codes(quantized.z_q), z_BDHW, quantized)

    def _decode_codes(self, z_q_BDHW: torch.Tensor) -> torch.Tensor:
        images_BCHW: torch.Tensor = self.decoder(self.post_quant_conv(z_q_BDHW))
        return images_BCHW

    def digest(self) -> str:
        """SHA-256 (hex) of architecture and weights, wherever they were read from."""
        quantizer = self.config.quantizer.model_dump(mode="json")
        shape = [self.config.model.model_dump(mode="json"), quantizer, self.config.data.channels]
        return digest_of(self, shape)

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, and a plugin's source where the quantizer is of one, into a
        folder, made if absent; each replaced in one step."""
        write_json(Path(folder) / "config.json", self.config.to_json_dict())
        save_source(self.config.quantizer.method, Path(folder))
        write_tensors(Path(folder) / "model.safetensors", self.state_dict())


def digest_of(network: nn.Module, architecture: Any) -> str:
    """SHA-256 (hex) of an architecture, as JSON has it, and of a network's weights."""
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote or that a finished run directory holds (its averaged weights), in eval
    mode on the CPU.

    Raises:
        ConfigError: the folder lacks a file or is a transformer's, its config is not valid, its quantizer is of a
            plugin that is not here, or the weights do not fit the config.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ConfigError(
                f"{folder} holds no {name}; pass a folder written by Tokenizer.save or the directory of a finished run"
            )
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ConfigError(
            f"{folder / 'config.json'} is not JSON ({error}); pass the folder of another run or save it again"
        ) from None
    if isinstance(config, dict) and "tokenizer" in config:
        raise ConfigError(
            f"{folder} is a transformer's run, not a tokenizer's; pass its tokenizer, {folder / 'tokenizer'}"
        )
    require_source(folder, config)
    tokenizer = Tokenizer(TrainConfig.parse(config))
    path = folder / "model.safetensors"
    try:
        tensors = unwrapped(path, load_file(path))
    except SafetensorError as error:
        raise ConfigError(f"{path} does not hold this config's weights: {' '.join(str(error).split())}") from None
    if why := misfit(tensors, tokenizer):
        raise ConfigError(f"{path} does not hold this config's weights: {why}; pass the folder as it was saved")
    tokenizer.load_state_dict(tensors)
    return tokenizer.eval()
