"""Config fields that quantizers share: sizes, codebook initialisation, quantization terms and entropy penalty."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ibq.schema import QuantizerConfig

CodebookInit = Literal["uniform", "normal", "features", "kmeans"]
FROM_FEATURES = ("features", "kmeans")


class EmbeddingConfig(QuantizerConfig):
    """Initialisation of a learnt codebook: U(-1/K, 1/K), N(0, 1), K of the encoder's features, or k-means of them."""

    codebook_init: CodebookInit = "uniform"
    init_scale: float = Field(1.0, gt=0, description="factor on codes drawn from U or N")

    @property
    def unit_norm(self) -> bool:
        """True if features and codes are compared at unit length."""
        return False

    @property
    def places_codes(self) -> bool:
        return True

    @model_validator(mode="after")
    def _scale_means_something(self) -> EmbeddingConfig:
        if self.init_scale != 1 and (self.unit_norm or self.codebook_init in FROM_FEATURES):
            why = (
                "codes are at unit length"
                if self.unit_norm
                else f"codebook_init={self.codebook_init!r} takes features as they are"
            )
            raise ValueError(f"init_scale={self.init_scale:g} has no effect, since {why}; leave it out")
        return self


class TermsConfig(QuantizerConfig):
    """Weights of the two quantization terms and of the entropy penalty.

    `beta` (0.25 in the literature) stands on the commitment term (VQ-VAE's order), on the codebook term (the order of
    taming-transformers and SEED-Voken) or on both; docs/method.md section 2. `entropy_weight` 0 switches the entropy
    penalty off.
    """

    beta: float = Field(0.25, ge=0)
    beta_on: Literal["commitment", "codebook", "both"] = "codebook"
    entropy_weight: float = Field(0.0, ge=0)
    entropy_temperature: float = Field(0.01, gt=0)

    @property
    def active_entropy_temperature(self) -> float | None:
        return self.entropy_temperature if self.entropy_weight else None

    @property
    def loss_weights(self) -> dict[str, float]:
        weights = {
            "commitment": self.beta if self.beta_on in ("commitment", "both") else 1.0,
            "codebook": self.beta if self.beta_on in ("codebook", "both") else 1.0,
        }
        if self.entropy_weight:
            weights |= {"sample_entropy": self.entropy_weight, "codebook_entropy": -self.entropy_weight}
        return weights


class CodebookConfig(EmbeddingConfig, TermsConfig):
    """Fields of the methods that learn a codebook by gradient."""
