"""The one contract that every quantizer keeps, and the registry that finds a quantizer by its config.

Tensor suffixes here and in all quantizers: B images, D code dimension, H W token grid, N = B*H*W tokens, K codes.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from ibq.distributed import copy_from_first
from ibq.errors import ConfigError, one_sentence
from ibq.ops.arguments import require_finite
from ibq.ops.precision import full_float32
from ibq.quantizers.config import FROM_FEATURES, EmbeddingConfig
from ibq.quantizers.entropy import euclidean_as_dot
from ibq.quantizers.updates import kmeans
from ibq.schema import QuantizerConfig

KMEANS_FEATURES = 4  # per code: the means of fewer features are hardly means


class Quantized(NamedTuple):
    """Return value of every quantizer.

    Attributes:
        z_q: (B, D, H, W), float32; its value is exactly the selected codes, its gradient is the method's.
        indices: (B, H, W), int64, in [0, K).
        losses: raw scalar terms by name, each differentiable; `config.loss_weights` weighs them.
    """

    z_q: torch.Tensor
    indices: torch.Tensor
    losses: dict[str, torch.Tensor]


class Quantizer(nn.Module):
    """Base of every quantizer. A subclass names its config class: ``class Mine(Quantizer, config=MineConfig)``; that
    registers it.

    A subclass implements `codebook` and `quantize`, `to_code_space` if it compares codes with something else than z
    itself, and `logits` if it does not choose the nearest code; the base keeps shapes, float32 and the index look-up
    the same for all.
    """

    registry: ClassVar[dict[str, type[Quantizer]]] = {}
    config_class: ClassVar[type[QuantizerConfig]]
    paper: ClassVar[str] = ""
    """Where the method comes from, for tables."""
    group: dist.ProcessGroup | None = None
    """Processes that train together and share the mean assignment of the entropy penalty; None keeps it local, as
    released.

    Set it on all of them alike. Then each step of training is a collective: all run it, and what is not finite on one
    is refused by all. Evaluation never is. A copy of the quantizer, such as averaged weights, has none.
    """
    peers: dist.ProcessGroup | None = None
    """Where the mean is local: processes that train together all the same, and refuse together what is not finite;
    otherwise as `group`."""

    def __init_subclass__(cls, *, config: type[QuantizerConfig] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if config is not None:
            cls.config_class = config
            Quantizer.registry[config.model_fields["method"].default] = cls

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.group: dist.ProcessGroup | None = None
        self.peers: dist.ProcessGroup | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"group": None, "peers": None}  # a group can be neither copied nor pickled

    @property
    def logit_scale(self) -> float | None:
        """The factor on `z C^T` in the softmax that a token's gradient goes through; None where the gradient of z_q
        knows no softmax."""
        return None

    @property
    def training_group(self) -> dist.ProcessGroup | None:
        """The group in training, None in evaluation, where processes run different numbers of batches."""
        return self.group if self.training else None

    @property
    def codebook(self) -> torch.Tensor:
        """(K, D): the tensor that codes are gathered from, in the forward pass and in `indices_to_codes` alike."""
        raise NotImplementedError

    def to_code_space(self, z: torch.Tensor) -> torch.Tensor:
        """Of features (N, D) or (B, D, H, W) what codes are compared with: z, or z normalised or bounded; errors are
        measured there."""
        return z

    def logits(self, z_ND: torch.Tensor) -> torch.Tensor:
        """Scores (N, K) of every code for features (N, D), the largest of which names the code; for analysis, training
        does without.

        -|z - c|^2 in the space of the codes up to a constant a token, unless a method says otherwise: beside |z|^2 the
        differences between the codes of a large codebook would be lost to rounding.
        """
        query_NE, key_KE = euclidean_as_dot(self.to_code_space(z_ND), self.codebook)
        with full_float32(z_ND.device):
            return query_NE @ key_KE.T

    def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """The method itself on flat float32 features; returns z_q (N, D), indices (N,) and the raw loss terms."""
        raise NotImplementedError

    def forward(self, z_BDHW: torch.Tensor) -> Quantized:
        """Quantize a feature map.

        Args:
            z_BDHW: features (B, D, H, W), any float dtype; computed in at least float32, also inside autocast.

        Raises:
            ValueError: z has not four dimensions, or its channels are not the config's code_dim.
            NonFiniteInputError: z has NaN or infinite values; in training with a group, z or the codebook of any
                process has.
        """
        if z_BDHW.dim() != 4 or z_BDHW.shape[1] != self.config.code_dim:
            raise ValueError(
                f"features of shape {tuple(z_BDHW.shape)} do not fit code_dim={self.config.code_dim}; pass (B, "
                f"code_dim, H, W)"
            )
        B, D, H, W = z_BDHW.shape
        with torch.autocast(z_BDHW.device.type, enabled=False):
            z_ND = z_BDHW.permute(0, 2, 3, 1).reshape(-1, D)
            z_ND = z_ND if z_ND.dtype == torch.float64 else z_ND.float()
            if not torch.compiler.is_compiling():  # whose graph would break; there the operator alone checks
                self._require_finite(z_ND)
            z_q_ND, indices_N, losses = self.quantize(z_ND)
        return Quantized(z_q_ND.reshape(B, H, W, D).permute(0, 3, 1, 2), indices_N.reshape(B, H, W), losses)

    def _require_finite(self, z_ND: torch.Tensor) -> None:
        group = self.group or self.peers
        if group is None or not self.training:
            require_finite(features=z_ND)  # the operators look at the codebook
        else:  # before any of them refuses a codebook on one process alone
            require_finite(group.group_name, features=z_ND, codebook=self.codebook)

    def restart_codes(
        self, dead_K: torch.Tensor, features_MD: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """As `CodebookQuantizer.restart_codes`, for methods without single codes to place."""
        raise ConfigError(f"method={self.config.method!r} has no codes that can be placed one by one; restart none")

    def sync_average(self, average: Quantizer) -> None:
        """Copy to `average`, whose weights have just been averaged with these, what must not be averaged: nothing by
        default.

        To be called after every training step, since it may depend on the step's forward.
        """

    def indices_to_codes(self, indices_BHW: torch.Tensor) -> torch.Tensor:
        """Codes (B, D, H, W) of integer indices (B, H, W): bit for bit the values of z_q.

        Raises:
            ValueError: indices are not integers or lie outside [0, K).
        """
        if indices_BHW.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
            raise ValueError(
                f"indices of dtype {indices_BHW.dtype} are not integers; pass int64 in [0, {self.config.codebook_size})"
            )
        if indices_BHW.numel():
            low, high = int(indices_BHW.min()), int(indices_BHW.max())
            if low < 0 or high >= self.config.codebook_size:
                raise ValueError(
                    f"indices reach from {low} to {high}; they must lie in [0, {self.config.codebook_size})"
                )
        with torch.autocast(indices_BHW.device.type, enabled=False):
            return self.codebook[indices_BHW.long()].permute(0, 3, 1, 2)


class CodebookQuantizer(Quantizer):
    """A quantizer whose codes are one (K, D) embedding, as it stands or at unit length, and the ways such a codebook
    can begin."""

    config: EmbeddingConfig

    def __init__(self, config: EmbeddingConfig) -> None:
        super().__init__(config)
        K, D = config.codebook_size, config.code_dim
        self.embedding = nn.Parameter(torch.empty(K, D))
        self.initialized: torch.Tensor
        self.register_buffer("initialized", torch.tensor(config.codebook_init not in FROM_FEATURES))
        if config.codebook_init == "uniform":
            nn.init.uniform_(self.embedding, -1 / K, 1 / K)
        else:  # codes that await their features hold N(0, 1) until then, so that a state_dict is always finite
            nn.init.normal_(self.embedding)
        with (
            torch.no_grad()
        ):  # rows at unit length where only their direction counts, as in LlamaGen: it sets how fast they turn
            self.embedding.copy_(self.to_code_space(config.init_scale * self.embedding))

    @property
    def codebook(self) -> torch.Tensor:
        return self.to_code_space(self.embedding)

    def to_code_space(self, z: torch.Tensor) -> torch.Tensor:
        return F.normalize(z, dim=1) if self.config.unit_norm else z

    @property
    def awaits_features(self) -> bool:
        """True while codebook_init is 'features' or 'kmeans' and `initialize_from` has not run."""
        return self.config.codebook_init in FROM_FEATURES and not bool(self.initialized)

    @property
    def features_wanted(self) -> int:
        """Number of features that `initialize_from` should get."""
        return self.config.codebook_size * (KMEANS_FEATURES if self.config.codebook_init == "kmeans" else 1)

    @torch.no_grad()
    def initialize_from(self, features_MD: torch.Tensor, generator: torch.Generator) -> None:
        """Set the codes to K distinct rows of features, drawn at random, or to their k-means; of several processes,
        rank 0's count.

        Args:
            features_MD: encoder outputs (M, D), M >= K; `features_wanted` of them are enough.
            generator: CPU generator of the draw.

        Raises:
            ValueError: fewer features than codes, or of another dimension.
        """
        K, D = self.embedding.shape
        if features_MD.dim() != 2 or features_MD.shape[1] != D or features_MD.shape[0] < K:
            raise ValueError(
                f"features of shape {tuple(features_MD.shape)} cannot initialise {K} codes; pass at least ({K}, {D})"
            )
        features_MD = self.to_code_space(features_MD)
        if self.config.codebook_init == "kmeans":
            self.embedding.copy_(kmeans(features_MD, K, generator))
        else:
            rows = torch.randperm(features_MD.shape[0], generator=generator)[:K]
            self.embedding.copy_(features_MD[rows.to(features_MD.device)])
        copy_from_first(self.embedding)
        self.initialized.fill_(True)

    @torch.no_grad()
    def restart_codes(
        self, dead_K: torch.Tensor, features_MD: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Put dead codes on distinct random features, by hand and at once; where more are dead than there are features,
        the others stay.

        Args:
            dead_K: bool (K,), which codes.
            features_MD: encoder outputs (M, D).
            generator: CPU generator of the draw.

        Returns:
            bool (K,), which codes have moved.

        Raises:
            ConfigError: the method places no single codes.
        """
        rows = torch.randperm(len(features_MD), generator=generator).to(features_MD.device)
        moved = dead_K.nonzero().flatten()[: len(rows)]
        anchors_KD = self.embedding.detach().clone()
        anchors_KD[moved] = self.to_code_space(features_MD.to(self.embedding.dtype))[rows[: len(moved)]]
        self.embedding.copy_(anchors_KD)
        return torch.zeros_like(dead_K).index_fill(0, moved, True)

    def forward(self, z_BDHW: torch.Tensor) -> Quantized:
        if self.training and self.awaits_features:
            raise ValueError(
                f"codebook_init={self.config.codebook_init!r} and no features seen yet; call initialize_from with at "
                f"least "
                f"{self.config.codebook_size} encoder outputs before training"
            )
        return super().forward(z_BDHW)


def quantization_terms(z_ND: torch.Tensor, codes_ND: torch.Tensor) -> dict[str, torch.Tensor]:
    """The two one-sided terms of VQ-VAE (arXiv 1711.00937, eq. 3): commitment moves z, codebook moves the selected
    codes; element means."""
    return {
        "commitment": (z_ND - codes_ND.detach()).square().mean(),
        "codebook": (z_ND.detach() - codes_ND).square().mean(),
    }


def parse_quantizer_config(value: Any) -> QuantizerConfig:
    """A QuantizerConfig from itself or from a dict with a `method` key.

    Raises:
        ValueError: the method is unknown (all known ones are named) or a field is.
    """
    if isinstance(value, QuantizerConfig):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"a quantizer config must be a dict or a QuantizerConfig, not {type(value).__name__}")
    method = value.get("method")
    if not isinstance(method, str) or method not in Quantizer.registry:
        raise ValueError(f"method={method!r} is not a quantizer; choose one of {', '.join(sorted(Quantizer.registry))}")
    return Quantizer.registry[method].config_class.model_validate(value)


def build_quantizer(config: QuantizerConfig | dict[str, Any]) -> Quantizer:
    """The quantizer that a config (or its dict form, with the key `method`) describes.

    Raises:
        ValueError: unknown method, unknown field or a value out of range, in one sentence.
    """
    try:
        parsed = parse_quantizer_config(config)
    except ValidationError as error:
        raise ConfigError(one_sentence(error)) from None
    return Quantizer.registry[parsed.method](parsed)


def straight_through(z_ND: torch.Tensor, codes_ND: torch.Tensor) -> torch.Tensor:
    """The gradient of z_q is copied to z (VQ-VAE, arXiv 1711.00937)."""
    return codes_ND.detach() + (z_ND - z_ND.detach())


def rotation(z_ND: torch.Tensor, codes_ND: torch.Tensor) -> torch.Tensor:
    """z_q = |q|/|z| R z with the rotation R that takes z's direction to the code's, both constants (arXiv 2410.06424,
    eq. 4).

    So a gradient reaches z turned by the angle between z and its code, and scaled by the ratio of their lengths.
    """
    q_ND = codes_ND.detach()
    from_ND, to_ND = F.normalize(z_ND.detach(), dim=1), F.normalize(q_ND, dim=1)
    half_ND = F.normalize(from_ND + to_ND, dim=1)
    along_half_N1 = (z_ND * half_ND).sum(1, keepdim=True)
    along_from_N1 = (z_ND * from_ND).sum(1, keepdim=True)
    ratio_N1 = q_ND.norm(dim=1, keepdim=True) / z_ND.detach().norm(dim=1, keepdim=True).clamp_min(1e-12)
    rotated_ND = ratio_N1 * (z_ND - 2 * along_half_N1 * half_ND + 2 * along_from_N1 * to_ND)
    return straight_through(rotated_ND, q_ND)
