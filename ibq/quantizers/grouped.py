"""Grouped quantization (GSQ, arXiv 2412.02632; MGVQ, arXiv 2507.07997; the groups of WeTok, arXiv 2508.05599): features
are split into G parts of D / G channels, each with a quantizer and a codebook of its own.

What it changes against a whole codebook: G parts of k codes make K = k^G, of which only G k are learnt, searched and
    restarted. A token's index stays one number below K, whose digits are the parts' indices (`parts_of`), so that
    methods are compared at equal K. MGVQ drops the last parts now and then in training (`drop_last`), so that the
    first ones carry most.
Suffixes: N tokens, D code dimension, G parts, K codes, k codes of a part, d = D / G, S numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationInfo, field_serializer, field_validator
from torch import nn

from ibq.quantizers.base import Quantizer
from ibq.quantizers.build import build_quantizer, parse_quantizer_config
from ibq.quantizers.parts import MOST_CODES, PartsQuantizer
from ibq.schema import QuantizerConfig

SIZES = ("codebook_size", "code_dim")
HANDED_ON = ("group", "peers")
"""Attributes that are set from outside, and hold for the parts as well."""


class GroupedConfig(QuantizerConfig):
    """`inner` is the quantizer of every part, with `method` and any fields but its sizes: these follow, d = D / G and
    k = K^(1/G), or, of 2^b codes where G does not divide b, the bits shared out, the first parts having one more. What
    it draws or moves in its forward pass, every part does by itself.

    `drop_last` are the probabilities, ascending, with which a training forward drops part 1 and all after it, part 2
    and all after it, and so on, by one draw; MGVQ has (0.2, 0.3, 0.4) for four parts. Dropped parts of z_q are zeros
    without a gradient, and have no part in the losses; their indices are what they would be.
    """

    method: Literal["grouped"] = "grouped"
    groups: int = Field(2, strict=True, ge=2, description="G, the number of parts")
    inner: Annotated[SerializeAsAny[QuantizerConfig], BeforeValidator(parse_quantizer_config)] = Field(
        {"method": "vq"},  # type: ignore[assignment]  # defaults are validated, and so parsed
        description="the quantizer of a part, without its sizes",
    )
    drop_last: tuple[float, ...] = Field((), description="of the last parts in training; MGVQ, arXiv 2507.07997")

    @field_validator("groups")
    @classmethod
    def _parts_make_the_code(cls, groups: int, info: ValidationInfo) -> int:
        K, D = (info.data.get(name) for name in SIZES)
        if K is not None and K > MOST_CODES:
            raise ValueError(f"codebook_size={K} is more than the 2^62 codes that an index can name; take fewer")
        if K is not None and math.prod(sizes_of_parts(K, groups)) != K:
            raise ValueError(
                f"codebook_size={K} is neither the power groups={groups} of a whole number nor a power of two, at "
                f"least {2**groups}; set it to {math.prod(sizes_of_parts(K, groups))}"
            )
        if D is not None and D % groups:
            raise ValueError(f"code_dim={D} is not a multiple of groups={groups}; set it to {D - D % groups + groups}")
        return groups

    @field_validator("inner", mode="before")
    @classmethod
    def _has_the_size_of_a_part(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, QuantizerConfig):
            value = {"method": value.method} | value.model_dump(mode="json", exclude_unset=True)
        if not isinstance(value, dict) or not {"groups", *SIZES} <= info.data.keys():
            return value
        if value.get("method") == "grouped":
            raise ValueError("method='grouped' cannot be the quantizer of a part; set more groups instead")
        K, D, groups = (info.data[name] for name in (*SIZES, "groups"))
        sizes = sizes_of_parts(K, groups)
        for name, whole, part in zip(SIZES, (K, D), (sizes[0], D // groups), strict=True):
            if value.get(name, part) != part:
                raise ValueError(
                    f"{name}={value[name]} is not the {part} that groups={groups} make of {name}={whole}; leave it out"
                )
            value = value | {name: part}
        if sizes[-1] != sizes[0]:
            parse_quantizer_config(value | {"codebook_size": sizes[-1]})  # of the first parts' size it is parsed next
        return value

    @field_validator("drop_last")
    @classmethod
    def _drops_are_nested(cls, drop_last: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        groups = info.data.get("groups")
        if drop_last and groups is not None and len(drop_last) != groups - 1:
            raise ValueError(
                f"drop_last={drop_last} has not one probability for each part but the first of groups={groups}; give "
                f"{groups - 1}"
            )
        if list(drop_last) != sorted(drop_last) or any(not 0 <= p < 1 for p in drop_last):
            raise ValueError(f"drop_last={drop_last} are not ascending probabilities below 1, as in (0.2, 0.3, 0.4)")
        return drop_last

    @field_serializer("inner")
    def _without_sizes(self, inner: QuantizerConfig) -> dict[str, Any]:
        return {name: value for name, value in inner.model_dump(mode="json").items() if name not in SIZES}

    @property
    def loss_weights(self) -> dict[str, float]:
        return self.inner.loss_weights

    @property
    def changes_in_forward(self) -> bool:
        return self.inner.changes_in_forward or bool(self.drop_last)

    @property
    def part_sizes(self) -> tuple[int, ...]:
        return sizes_of_parts(self.codebook_size, self.groups)

    @property
    def of_parts(self) -> list[QuantizerConfig]:
        """The config of each part."""
        return [self.inner.model_copy(update={"codebook_size": k}) for k in self.part_sizes]


class GroupedQuantizer(PartsQuantizer, config=GroupedConfig):
    """Each part of z by its own quantizer; losses are the means over parts, of each term by its name.

    Gradient reach: that of the inner method, within the part.
    """

    config: GroupedConfig
    paper = "GSQ, arXiv 2412.02632; MGVQ, arXiv 2507.07997"

    def __init__(self, config: GroupedConfig) -> None:
        super().__init__(config)
        self.quantizers = nn.ModuleList(map(build_quantizer, config.of_parts))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in HANDED_ON and "quantizers" in self._modules:
            for part in self.parts:
                setattr(part, name, value)

    @property
    def parts(self) -> Sequence[Quantizer]:
        """The quantizers of the parts."""
        return list(self.quantizers)  # type: ignore[arg-type]  # a ModuleList does not say of what

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def logit_scale(self) -> float | None:
        return self.parts[0].logit_scale

    @property
    def leaves_to_next_forward(self) -> bool:
        return any(part.leaves_to_next_forward for part in self.parts)

    @property
    def trains_between_codes(self) -> bool:
        return bool(self.config.drop_last) or self.parts[0].trains_between_codes

    @property
    def learnt_codes(self) -> torch.Tensor | None:
        learnt = [codes.flatten() for part in self.parts if (codes := part.learnt_codes) is not None]
        return torch.cat(learnt) if learnt else None

    def reconfigure(self, config: QuantizerConfig) -> None:
        assert isinstance(config, GroupedConfig)
        super().reconfigure(config)
        for part, of_part in zip(self.parts, config.of_parts, strict=True):
            part.reconfigure(of_part)

    def set_step(self, step: int) -> None:
        super().set_step(step)
        for part in self.parts:
            part.set_step(step)

    def codes_of(self, indices: torch.Tensor) -> torch.Tensor:
        digits = self.digits_of(indices.to(self.levels.device)[..., None]).unbind(-1)
        return torch.cat([part.codes_of(of_part) for part, of_part in zip(self.parts, digits, strict=True)], -1)

    def to_code_space(self, z: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.to_code_space(of_part) for part, of_part in self._split(z)], 1)

    def logits(self, z_ND: torch.Tensor) -> torch.Tensor:
        """Sums of the parts' scores (N, K)."""
        logits_NK = z_ND.new_zeros(len(z_ND), 1, dtype=torch.float32)
        for part, z_Nd in self._split(z_ND):
            logits_NK = (part.logits(z_Nd)[:, :, None] + logits_NK[:, None]).flatten(1)
        return logits_NK

    def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        codes, indices, terms = zip(*[part.quantize(z_Nd) for part, z_Nd in self._split(z_ND)], strict=True)
        losses = {name: torch.stack([of_part[name] for of_part in terms]) for name in terms[0]}
        if self.training and self.config.drop_last:
            kept_G = self._kept(z_ND)
            codes = tuple(torch.where(kept, of_part, 0) for kept, of_part in zip(kept_G, codes, strict=True))
            losses = {name: term_G * kept_G for name, term_G in losses.items()}
        return (
            torch.cat(codes, 1),
            self.indices_of(torch.stack(indices, 1)),
            {name: term_G.mean() for name, term_G in losses.items()},
        )

    def _kept(self, z_ND: torch.Tensor) -> torch.Tensor:
        """Which parts a training forward keeps (G,): the first, and those whose probability the draw is not below."""
        drop_G = z_ND.new_tensor((0.0, *self.config.drop_last))
        return torch.rand((), device=z_ND.device) >= drop_G

    @property
    def awaits_features(self) -> bool:
        return any(part.awaits_features for part in self.parts)

    @property
    def features_wanted(self) -> int:
        return max(part.features_wanted for part in self.parts)

    def initialize_from(self, features_MD: torch.Tensor, generator: torch.Generator) -> None:
        """As `CodebookQuantizer.initialize_from`, each part from its own channels."""
        for part, features_Md in self._split(features_MD):
            part.initialize_from(features_Md, generator)

    @property
    def features_to_cluster(self) -> int:
        return max(part.features_to_cluster for part in self.parts)

    def cluster(self, features_MD: torch.Tensor, generator: torch.Generator) -> None:
        for part, features_Md in self._split(features_MD):
            part.cluster(features_Md, generator)

    def sync_average(self, average: Quantizer) -> None:
        assert isinstance(average, GroupedQuantizer)
        for part, of_average in zip(self.parts, average.parts, strict=True):
            part.sync_average(of_average)

    def _split(self, z: torch.Tensor) -> list[tuple[Quantizer, torch.Tensor]]:
        """Each part's quantizer and its channels of features (N, D) or (B, D, H, W).

        Raises:
            ValueError: they have not the config's code_dim.
        """
        if z.dim() < 2 or z.shape[1] != self.config.code_dim:
            raise ValueError(f"features of shape {tuple(z.shape)} do not fit code_dim={self.config.code_dim}")
        return list(zip(self.parts, z.chunk(self.config.groups, 1), strict=True))


def sizes_of_parts(codebook_size: int, groups: int) -> tuple[int, ...]:
    """Number of codes of each part: equal ones, or powers of two where those alone make K; of a K that no such parts
    make, equal ones of the nearest that is made so."""
    root = round(codebook_size ** (1 / groups))
    root = min((root - 1, root, root + 1), key=lambda k: abs(k**groups - codebook_size))
    bits, odd = divmod(codebook_size.bit_length() - 1, groups)
    if root**groups != codebook_size and codebook_size == 1 << bits * groups + odd and bits:
        return (2 ** (bits + 1),) * odd + (2**bits,) * (groups - odd)
    return (max(2, root),) * groups
