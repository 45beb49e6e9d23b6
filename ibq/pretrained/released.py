"""Checkpoints of the paper's authors (docs/method.md section 8): every key accounted for, sizes inferred from shapes,
nothing unpickled but tensors.

A released file is a Lightning checkpoint: a zip archive of torch.save that holds a `state_dict` among other things.
That of a tokenizer has each weight twice, as trained and averaged (`model_ema.` and the name without dots), and the
training loss's networks. That of a transformer has `transformer.` and, under `first_stage_model.`, the tokenizer whose
indices it was trained on.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ValidationError

from ibq.config import TrainConfig, imagenet_steps
from ibq.data.images import one_line, quoted
from ibq.errors import ConfigError, DataError, one_sentence
from ibq.models.config import HEAD_DIM, TransformerConfig
from ibq.models.tokenizer import Tokenizer, digest_of
from ibq.models.transformer import Transformer
from ibq.pretrained.checkpoint_file import read_tensors

Weights = Literal["ema", "raw"]


class TrainedTransformer(NamedTuple):
    """A transformer and the tokenizer that turns its tokens into images; both in eval mode.

    `averaged` says whether averaged weights were taken where there is a choice: of a run the transformer's, of a
    released file the tokenizer's.
    """

    transformer: Transformer
    tokenizer: Tokenizer
    averaged: bool

    def digest(self) -> str:
        """SHA-256 (hex) of architecture and weights of both, wherever they were read from."""
        parts = (digest_of(self.transformer, self.transformer.config.model_dump(mode="json")), self.tokenizer.digest())
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


RELEASED_SUFFIXES = (".ckpt", ".pt", ".pth")
RESOLUTION = 256
NORM_GROUPS = 32
TRANSFORMER, TOKENIZER, AVERAGES = "transformer.", "first_stage_model.", "model_ema."
BATCHNORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def load_released(path: str | Path, weights: Weights = "ema") -> Tokenizer | TrainedTransformer:
    """A tokenizer or a transformer from a checkpoint of the paper's authors, in eval mode, float32, on the CPU.

    Sizes come from the shapes of the tensors, but for three that leave no trace in them: 32 groups in GroupNorm,
    attention placed at a resolution of 256, and a grid of tokens that covers 256 pixels, all as released. The weights
    are copied once; the file is mapped, not read whole. The tokenizer's config is the released recipe (docs/method.md
    section 5), as provenance; the folder and the seed in it are placeholders, because neither is reported.

    Args:
        path: the .ckpt file; a .pt or .pth file that holds the tensors alone will do, as will the weights of networks
            wrapped by DDP, FSDP or torch.compile, which a line on stderr says.
        weights: of a tokenizer "ema", the averaged weights, or "raw", the trained ones. A transformer has none but the
            trained ones, and the tokenizer beside it is taken as it stands where it has no averages (the authors' code
            puts them in the place of the trained weights there).

    Returns:
        a Tokenizer, or a Transformer if the file is a transformer's; its `averaged` is of the tokenizer.

    Raises:
        DataError: the file is absent, cut off, no checkpoint, or holds objects that could run code; a key is missing,
            unknown, of another shape or no plain tensor (it is named); the shapes fit no architecture; tokenizer and
            transformer do not belong together; a weight is not finite. The archive's checksums are not read: bytes that
            changed and still are finite numbers go unnoticed.
        ConfigError: `weights` is neither "ema" nor "raw".
    """
    if weights not in ("ema", "raw"):
        raise ConfigError(f"weights={weights!r} must be 'ema' or 'raw'")
    path = Path(path)
    tensors = read_tensors(path)
    if any(name.startswith((TRANSFORMER, TOKENIZER)) for name in tensors):
        return _transformer(path, tensors, weights)
    part = _Part(path, tensors)
    if not any(part.has(beginning) for beginning in ("encoder.", "decoder.", "quantize.")):
        first = f"; its first key is {next(iter(tensors))!r}" if tensors else ""
        raise DataError(f"{quoted(path)} holds neither a tokenizer nor a transformer of the released layout{first}")
    if weights == "ema" and not part.averaged:
        raise DataError(
            f"{quoted(path)} holds no averaged weights (no key begins with {AVERAGES!r}); pass weights='raw' (of a "
            f"command: --weights raw)"
        )
    config = _tokenizer_config(part)
    _require_layout(path, tensors, _tokenizer_layout(part, config))
    return _tokenizer(part, config, averaged=weights == "ema")


def _transformer(path: Path, tensors: dict[str, torch.Tensor], weights: Weights) -> TrainedTransformer:
    embedded, part = _Part(path, tensors, TOKENIZER), _Part(path, tensors, TRANSFORMER)
    tokenizer_config = _tokenizer_config(embedded)
    config = _transformer_config(part, RESOLUTION // tokenizer_config.model.downsampling)
    with torch.device("meta"):
        transformer = Transformer(config)
    shapes = {TRANSFORMER + name: tensor.shape for name, tensor in transformer.state_dict().items()}
    _require_layout(path, tensors, shapes | _tokenizer_layout(embedded, tokenizer_config))
    K = tokenizer_config.quantizer.codebook_size
    if config.codebook_size != K:
        raise DataError(
            f"{quoted(path)} holds a transformer over {config.codebook_size} codes and a tokenizer of {K}, which do "
            f"not belong together; "
            "take the file as it was released"
        )
    transformer.load_state_dict(part.weights({name: name for name in transformer.state_dict()}), assign=True)
    averaged = weights == "ema" and embedded.averaged
    return TrainedTransformer(transformer.eval(), _tokenizer(embedded, tokenizer_config, averaged=averaged), averaged)


class _Part:
    """The tensors whose names begin with `prefix`, under the rest of their names, and what can be asked of them."""

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor], prefix: str = "") -> None:
        self.path, self.prefix = path, prefix
        self.tensors = {
            name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
        }

    @property
    def averaged(self) -> bool:
        return self.has(AVERAGES)

    def has(self, beginning: str) -> bool:
        return any(name.startswith(beginning) for name in self.tensors)

    def require(self, beginning: str) -> None:
        if not self.has(beginning):
            raise DataError(
                f"{quoted(self.path)} lacks every key of {self.prefix + beginning!r}; take the file as it was released"
            )

    def consecutive(self, pattern: str) -> int:
        """Number of i, from 0 on, with a name that begins with `pattern` with i in it."""
        return next(i for i in itertools.count() if not self.has(pattern.format(i)))

    def size(self, *places: tuple[str, int]) -> int:
        """The size on which most of some (name, axis) agree, so that one wrong tensor is outvoted and named; the first
        wins a tie."""
        found = [(self.tensors[name], axis) for name, axis in places if name in self.tensors]
        votes = Counter(tensor.shape[axis] for tensor, axis in found if tensor.dim() > axis)
        if not votes:
            name = self.prefix + places[0][0]
            raise DataError(
                f"{quoted(self.path)} lacks {name!r}, or has it in a wrong shape; take the file as it was released"
            )
        return votes.most_common(1)[0][0]

    def unfit(self, why: str) -> DataError:
        """The error that says that the sizes contradict each other or the architecture."""
        return DataError(f"the shapes in {quoted(self.path)} fit no released architecture: {why}")

    def weights(self, keys: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """Float32 copies of the tensors under `keys`' values, by `keys`' keys. DataError: one is no float or not
        finite."""
        copies = {}
        for name, key in keys.items():
            tensor = self.tensors[key]
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                what = (
                    "NaN or infinity in"
                    if tensor.is_floating_point()
                    else f"{tensor.dtype}, which is no weight's type, in"
                )
                raise DataError(
                    f"{quoted(self.path)} has {what} {self.prefix + key!r}; take the file as it was released"
                )
            copies[name] = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return copies


# --- The layout -------------------------------------------------------------------------------------------------------


def _require_layout(path: Path, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """DataError: a key is missing, of another shape or unknown; the first is named, the number of all given."""
    missing = [name for name in shapes if name not in tensors]
    misshapen = [name for name in shapes if name in tensors and tensors[name].shape != shapes[name]]
    unknown = [name for name in tensors if name not in shapes]
    if missing:
        alike = difflib.get_close_matches(missing[0], unknown, n=1, cutoff=0.8)
        problem = f"lacks {missing[0]!r}" + (f" and has {alike[0]!r}, which is unknown" if alike else "")
    elif misshapen:
        name = misshapen[0]
        problem = (
            f"has {name!r} in the shape {tuple(tensors[name].shape)} where the other tensors want {tuple(shapes[name])}"
        )
    elif unknown:
        problem = f"has {unknown[0]!r}, which belongs to no part of the released layout"
    else:
        return
    number = len(missing) + len(misshapen) + len(unknown)
    raise DataError(
        f"{quoted(path)} {problem}{f' ({number} keys do not fit in all)' if number > 1 else ''}; take the file as it "
        f"was released"
    )


def _released_name(name: str) -> str:
    """Of a parameter of ours; the codebook is an nn.Embedding there."""
    return "quantize.embedding.weight" if name == "quantize.embedding" else name


def _average_name(name: str) -> str:
    return AVERAGES + name.replace(".", "")


def _tokenizer_layout(part: _Part, config: TrainConfig) -> dict[str, torch.Size]:
    """Shapes by key: a tokenizer's parameters and, where any average is there, those of all of them and of the
    discriminator's.

    The loss's networks are not imported: whatever begins with `loss.` is taken as it is, but averages have to match
    what they are of.
    """
    with torch.device("meta"):
        parameters = {_released_name(name): parameter.shape for name, parameter in Tokenizer(config).named_parameters()}
    loss = {name: tensor.shape for name, tensor in part.tensors.items() if name.startswith("loss.")}
    layout = parameters | loss
    if part.averaged:
        layout |= {AVERAGES + name: torch.Size() for name in ("decay", "num_updates")}
        layout |= {_average_name(name): shape for name, shape in parameters.items()}
        for name, shape in loss.items():  # the perceptual loss is frozen, so that an average of it may be there or not
            trained = name.startswith("loss.discriminator.") and not name.endswith(BATCHNORM_BUFFERS)
            if trained or _average_name(name) in part.tensors:
                layout[_average_name(name)] = shape
    return {part.prefix + name: shape for name, shape in layout.items()}


# --- Sizes from shapes ------------------------------------------------------------------------------------------------


def _tokenizer_config(part: _Part) -> TrainConfig:
    """The released recipe with the sizes that a tokenizer's tensors have."""
    for beginning in ("encoder.down.0.", "decoder.up.0."):
        part.require(beginning)
    levels = min(part.consecutive("encoder.down.{}."), part.consecutive("decoder.up.{}."))
    first = "encoder.down.0.block.0"
    base = part.size(
        ("encoder.conv_in.weight", 0),
        ("encoder.conv_in.bias", 0),
        (f"{first}.norm1.weight", 0),
        (f"{first}.norm1.bias", 0),
    )
    channels = part.size(("encoder.conv_in.weight", 1), ("decoder.conv_out.weight", 0), ("decoder.conv_out.bias", 0))
    widths = []
    for i in range(levels):
        block = f"encoder.down.{i}.block.0"
        widths.append(part.size((f"{block}.conv1.weight", 0), (f"{block}.conv1.bias", 0), (f"{block}.norm2.weight", 0)))
    blocks = Counter(part.consecutive(f"encoder.down.{i}.block.{{}}.") for i in range(levels))
    blocks.update(part.consecutive(f"decoder.up.{i}.block.{{}}.") - 1 for i in range(levels))
    attention = [i for i in range(levels) if part.has(f"encoder.down.{i}.attn.") and part.has(f"decoder.up.{i}.attn.")]
    bottleneck = (
        ("encoder.conv_out.weight", 0),
        ("encoder.conv_out.bias", 0),
        ("quant_conv.weight", 1),
        ("decoder.conv_in.weight", 1),
    )
    codes = "quantize.embedding.weight"
    K = part.size((codes, 0), (_average_name(codes), 0))
    D = part.size((codes, 1), ("quant_conv.weight", 0), ("quant_conv.bias", 0), ("post_quant_conv.weight", 1))
    if channels != 3:
        raise part.unfit(f"its images have {channels} channels where the released tokenizers read 3")
    if base < 1 or any(width % base for width in widths):
        raise part.unfit(
            f"levels of {', '.join(map(str, widths))} channels are not multiples of the {base} base channels"
        )
    model = {
        "base_channels": base,
        "channel_multipliers": [width // base for width in widths],
        "res_blocks": blocks.most_common(1)[0][0],
        "attention_resolutions": [RESOLUTION >> i for i in attention],
        "z_channels": part.size(*bottleneck),
        "norm_groups": NORM_GROUPS,
    }
    try:
        return TrainConfig.parse(_released_recipe(model, K, D))
    except ConfigError as error:
        raise part.unfit(one_line(error)) from None


def _released_recipe(model: dict[str, Any], K: int, D: int) -> dict[str, Any]:
    """docs/method.md sections 4 and 5; K = 8192 has a schedule and a precision of its own. Micro-batches as in
    `experiments.imagenet256`."""
    epochs, milestones, precision = (280, (250,), "bf16") if K == 8192 else (330, (250, 300), "fp16")
    batch_size = 256
    return {
        "data": {
            "name": "imagefolder:/imagenet/train",
            "resolution": RESOLUTION,
            "crop": "random",
            "resize": "released",
        },
        "model": model,
        "quantizer": {"method": "ibq", "codebook_size": K, "code_dim": D},
        "loss": {"perceptual": "lpips-vgg", "adversarial": {"weight": 0.1}},
        "optim": {"lr": 1e-4, "milestones": [epoch / epochs for epoch in milestones], "ema_decay": 0.999},
        "steps": imagenet_steps(epochs, batch_size),
        "batch_size": batch_size,
        "accumulate": 8,
        "averages": "local",
        "precision": precision,
    }


def _transformer_config(part: _Part, grid: int) -> TransformerConfig:
    part.require("blocks.0.")
    depth = part.consecutive("blocks.{}.")
    width = part.size(
        ("tok_emb.weight", 1),
        ("head.weight", 1),
        ("class_emb.embedding_table.weight", 1),
        ("head_nm.rmsnorm.weight", 0),
    )
    K = part.size(("head.weight", 0), ("tok_emb.weight", 0))
    labels = part.size(("class_emb.embedding_table.weight", 0))
    if width != HEAD_DIM * depth:
        raise part.unfit(f"{depth} blocks of width {width}, where the width is {HEAD_DIM} times the number of blocks")
    try:
        return TransformerConfig(depth=depth, codebook_size=K, classes=labels - 1, grid=grid)
    except ValidationError as error:
        raise part.unfit(one_sentence(error)) from None


# --- The networks -----------------------------------------------------------------------------------------------------


def _tokenizer(part: _Part, config: TrainConfig, *, averaged: bool) -> Tokenizer:
    with torch.device("meta"):  # draws no random numbers, and no memory is taken twice
        tokenizer = Tokenizer(config)
    keys = {name: _released_name(name) for name, _ in tokenizer.named_parameters()}
    weights = part.weights({name: _average_name(key) if averaged else key for name, key in keys.items()})
    tokenizer.load_state_dict({**weights, "quantize.initialized": torch.tensor(True)}, assign=True)
    return tokenizer.eval()
