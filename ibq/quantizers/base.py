"""The one contract that every quantizer keeps, and the registry that finds a quantizer by its config.

Tensor suffixes here and in all quantizers: B images, D code dimension, H W token grid, N = B*H*W tokens, K codes.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ibq.distributed import copy_from_first
from ibq.errors import ConfigError
from ibq.ops.arguments import require_finite
from ibq.ops.precision import at_least_float32, full_float32, outside_autocast
from ibq.quantizers.config import FROM_FEATURES, CodebookInit, EmbeddingConfig
from ibq.quantizers.entropy import euclidean_as_dot
from ibq.quantizers.shapes import kept_tokens, of_grid, require_indices, tokens_last
from ibq.quantizers.updates import StepCount, kmeans, recomputing
from ibq.schema import QuantizerConfig

KMEANS_FEATURES = 4  # per code: the means of fewer features are hardly means


class Quantized(NamedTuple):
    """Return value of every quantizer.

    Attributes:
        z_q: (B, D, H, W); its value is exactly the selected codes (but `trains_between_codes`), its gradient is the
            method's. float32, or what the module was cast to (`.bfloat16()`, `.half()`), as the next layer of a model
            that was cast wants it.
        indices: (B, H, W), int64, in [0, K).
        losses: raw scalar terms by name, each differentiable; `config.loss_weights` weighs them.
    """

    z_q: torch.Tensor
    indices: torch.Tensor
    losses: dict[str, torch.Tensor]


class Quantizer(nn.Module):
    """Base of every quantizer. A subclass names its config class: ``class Mine(Quantizer, config=MineConfig)``; that
    registers it, or is a ConfigError where the config names no method or another module's.

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
            method, name = config.model_fields["method"].default, f"{cls.__module__}.{cls.__qualname__}"
            if not isinstance(method, str):
                raise ConfigError(
                    f"{config.__name__} of {name} names no method; write method: Literal['mine'] = 'mine'"
                )
            taken = Quantizer.registry.get(method)
            if taken and taken.__module__ != cls.__module__:  # the same module: a notebook's cell that is run again
                of = f"{taken.__module__}.{taken.__qualname__}"
                raise ConfigError(f"method {method!r} of {name} is the name of {of}; choose another")
            Quantizer.registry[method] = cls

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.group: dist.ProcessGroup | None = None
        self.peers: dist.ProcessGroup | None = None
        self.step: int | None = None
        self._last_indices_N: torch.Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # a group can be neither copied nor pickled, and a copy has had no forward
        return self.__dict__ | {"group": None, "peers": None, "_last_indices_N": None}

    @property
    def dtype(self) -> torch.dtype:
        """Type of z_q and of `indices_to_codes`: that of the weights."""
        return next((parameter.dtype for parameter in self.parameters()), torch.float32)

    def reconfigure(self, config: QuantizerConfig) -> None:
        """Go on with other weights and rates; sizes are those of before."""
        self.config = config

    def set_step(self, step: int) -> None:
        """Say that so many optimizer steps are finished, before each of them: schedules then follow the steps, however
        many forwards one has (micro-batches). Until it is called, each training forward counts as a step."""
        self.step = step
        for module in self.modules():
            if isinstance(module, StepCount):
                module.set(step)

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
        """(K, D), at least float32: the tensor that codes are gathered from, in the forward pass and in
        `indices_to_codes` alike."""
        raise NotImplementedError

    @property
    def learnt_codes(self) -> torch.Tensor | None:
        """What of the codebook can leave the finite numbers, in any shape; None where nothing of it is learnt."""
        return self.codebook

    @property
    def awaits_features(self) -> bool:
        """True while codes are to begin at features and `initialize_from` has not run."""
        return False

    @property
    def features_wanted(self) -> int:
        """Number of features that `initialize_from` should get."""
        return 0

    def codes_of(self, indices: torch.Tensor) -> torch.Tensor:
        """Codes of indices of any shape, with D as one more dimension at the end."""
        return self.codebook[indices]

    @property
    def leaves_to_next_forward(self) -> bool:
        """True if a training forward changes what the next one does, so that one can be recomputed only before it."""
        return self.config.changes_in_forward

    @property
    def trains_between_codes(self) -> bool:
        """True if the values of z_q in training are points between codes, beside the indices; in evaluation they are
        codes, of every method."""
        return False

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
        query_NE, key_KE = euclidean_as_dot(self.to_code_space(at_least_float32(z_ND)), self.codebook)
        with full_float32(z_ND.device):
            return query_NE @ key_KE.T

    def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """The method itself on flat float32 features; returns z_q (N, D), indices (N,) and the raw loss terms."""
        raise NotImplementedError

    def forward(self, z_BDHW: torch.Tensor, mask: torch.Tensor | None = None) -> Quantized:
        """Quantize a feature map, a sequence or a video.

        Args:
            z_BDHW: features (B, D, H, W), (B, N, D) or (B, D, T, H, W), any float dtype; computed in at least float32,
                also inside autocast.
            mask: bool of the shape of the indices, False for padding. Such tokens have no part in losses, entropies,
                counts and updates; their index is 0, and z_q its code without a gradient.

        Returns:
            z_q of the shape of z, and indices of that shape without D.

        Raises:
            ValueError: z has other dimensions, its channels are not the config's code_dim, there is no token, the mask
                does not fit, or codes await features in training.
            NonFiniteInputError: z has NaN or infinite values; in training with a group, z or the codebook of any
                process has.
            ConfigError: a forward pass is recomputed, or repeated within a step, that cannot be.
        """
        if self.training and self.awaits_features:
            raise ValueError(
                f"method={self.config.method!r} begins at features and has seen none yet; call initialize_from with "
                f"{self.features_wanted} encoder outputs before training"
            )
        tokens = tokens_last(z_BDHW, self.config.code_dim)
        grid, D = tokens.shape[:-1], tokens.shape[-1]
        with outside_autocast(z_BDHW.device):
            z_ND = at_least_float32(tokens.reshape(-1, D))
            kept_N = None if mask is None else kept_tokens(mask, grid)
            z_ND = z_ND if kept_N is None else z_ND[kept_N]
            if not torch.compiler.is_compiling():  # whose graph would break; there the operator alone checks
                self._require_finite(z_ND)
            z_q_ND, indices_N, losses = self.quantize(z_ND)
            if self.training and self.leaves_to_next_forward:
                self._require_same_forward(indices_N)
            z_q_ND = z_q_ND.to(self.dtype)
            if kept_N is not None:
                indices_N = torch.zeros_like(kept_N, dtype=torch.int64).masked_scatter(kept_N, indices_N)
                padding_ND = self.codes_of(torch.zeros_like(indices_N)).detach().to(self.dtype)
                z_q_ND = padding_ND.masked_scatter(kept_N[:, None], z_q_ND)
        return Quantized(of_grid(z_q_ND, grid), indices_N.reshape(grid), losses)

    def _require_same_forward(self, indices_N: torch.Tensor) -> None:
        """Refuse the recomputation of another forward than the last: by then codes or schedules have moved on."""
        if not recomputing():
            self._last_indices_N = indices_N
        elif self._last_indices_N is None or not torch.equal(indices_N, self._last_indices_N):
            raise ConfigError(
                f"gradient checkpointing recomputes a forward pass of method={self.config.method!r} after another one "
                f"has changed its codes or schedule; call it once between backward passes, or leave it out of the "
                f"checkpoint"
            )

    def _require_finite(self, z_ND: torch.Tensor) -> None:
        group = self.group or self.peers
        if group is None or not self.training:
            require_finite(features=z_ND)  # the operators look at the codebook
        else:  # before any of them refuses a codebook on one process alone
            codebook = {} if (codes := self.learnt_codes) is None else {"codebook": codes}
            require_finite(group.group_name, features=z_ND, **codebook)

    def initialize_from(self, features_MD: torch.Tensor, generator: torch.Generator) -> None:
        """As `CodebookQuantizer.initialize_from`; nothing where codes do not begin at features."""

    def restart_codes(
        self, dead_K: torch.Tensor, features_MD: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """As `CodebookQuantizer.restart_codes`, for methods without single codes to place."""
        raise ConfigError(f"method={self.config.method!r} has no codes that can be placed one by one; restart none")

    @property
    def features_to_cluster(self) -> int:
        """Number of features that `cluster` should get; 0 where no code is learnt."""
        return 0

    def cluster(self, features_MD: torch.Tensor, generator: torch.Generator) -> None:
        """Set all codes to the k-means of features (M, D), `features_to_cluster` of them, as late quantization begins;
        nothing where no code is learnt. The CPU generator draws the first centers."""

    def sync_average(self, average: Quantizer) -> None:
        """Copy to `average`, whose weights have just been averaged with these, what must not be averaged: nothing by
        default.

        To be called after every training step, since it may depend on the step's forward.
        """

    def indices_to_codes(self, indices_BHW: torch.Tensor) -> torch.Tensor:
        """Codes (B, D, H, W) of indices (B, H, W) of any integer type: bit for bit the values of z_q. Those of a
        sequence (B, N) are (B, N, D), of a video (B, T, H, W) are (B, D, T, H, W).

        Raises:
            ValueError: indices are not integers, of another shape, or lie outside [0, K).
        """
        indices = require_indices(indices_BHW, self.config.codebook_size)
        with outside_autocast(indices.device):
            return of_grid(self.codes_of(indices), indices.shape).to(self.dtype)


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
        with torch.no_grad():  # unit length where only directions count, as in LlamaGen: it sets how fast they turn
            self.embedding.copy_(self.to_code_space(config.init_scale * self.embedding))

    @property
    def codebook(self) -> torch.Tensor:
        return self.to_code_space(at_least_float32(self.embedding))

    def to_code_space(self, z: torch.Tensor) -> torch.Tensor:
        return F.normalize(z, dim=1) if self.config.unit_norm else z

    @property
    def awaits_features(self) -> bool:
        return self.config.codebook_init in FROM_FEATURES and not bool(self.initialized)

    @property
    def features_wanted(self) -> int:
        return self.features_to_cluster if self.config.codebook_init == "kmeans" else self.config.codebook_size

    @property
    def features_to_cluster(self) -> int:
        return self.config.codebook_size * KMEANS_FEATURES

    def cluster(self, features_MD: torch.Tensor, generator: torch.Generator) -> None:
        self.place_codes(features_MD, generator, "kmeans")

    def initialize_from(self, features_MD: torch.Tensor, generator: torch.Generator) -> None:
        """Set the codes to K distinct rows of features, drawn at random, or to their k-means; of several processes,
        rank 0's count.

        Args:
            features_MD: encoder outputs (M, D), M >= K; `features_wanted` of them are enough.
            generator: CPU generator of the draw.

        Raises:
            ValueError: fewer features than codes, or of another dimension.
        """
        self.place_codes(features_MD, generator, self.config.codebook_init)

    @torch.no_grad()
    def place_codes(self, features_MD: torch.Tensor, generator: torch.Generator, init: CodebookInit) -> None:
        """Codes on features, drawn or clustered as `init` says; what counts as state of the old codes begins anew."""
        K, D = self.embedding.shape
        if features_MD.dim() != 2 or features_MD.shape[1] != D or features_MD.shape[0] < K:
            raise ValueError(
                f"features of shape {tuple(features_MD.shape)} cannot initialise {K} codes; pass at least ({K}, {D})"
            )
        features_MD = self.to_code_space(at_least_float32(features_MD))
        if init == "kmeans":
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
        features_MD = self.to_code_space(at_least_float32(features_MD))[rows[: len(moved)]]
        self.embedding[moved] = features_MD.to(self.embedding.dtype)
        return torch.zeros_like(dead_K).index_fill(0, moved, True)


def quantization_terms(z_ND: torch.Tensor, codes_ND: torch.Tensor) -> dict[str, torch.Tensor]:
    """The two one-sided terms of VQ-VAE (arXiv 1711.00937, eq. 3): commitment moves z, codebook moves the selected
    codes; element means."""
    return {
        "commitment": (z_ND - codes_ND.detach()).square().mean(),
        "codebook": (z_ND.detach() - codes_ND).square().mean(),
    }


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
