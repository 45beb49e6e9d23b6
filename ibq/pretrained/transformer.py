"""A trained transformer with its tokenizer, from the folder of a run or from a released file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ibq.config import TransformerTrainConfig
from ibq.data.images import one_line, quoted
from ibq.errors import ConfigError
from ibq.models.config import TransformerConfig
from ibq.models.tokenizer import Tokenizer, load_tokenizer
from ibq.models.transformer import Transformer
from ibq.models.weights import misfit, unwrapped
from ibq.pretrained.released import RELEASED_SUFFIXES, TrainedTransformer, Weights, load_released
from ibq.run_directory import RunDirectory


def load_transformer(
    path: str | Path, weights: Weights = "ema", tokenizer: str | Path | None = None
) -> TrainedTransformer:
    """The transformer of a finished run's folder, or of a transformer's checkpoint of the paper's authors; in eval
    mode, on the CPU.

    Args:
        path: the folder, or the .ckpt file.
        weights: of a released checkpoint, as in `load_released`; a run's folder holds one set of weights, the averaged
            ones if the transformer was trained with an average.
        tokenizer: a folder of a run's tokenizer in place of the one beside it, for a run's folder that was copied
            without; it has to be the one whose tokens the transformer was trained on. A released checkpoint holds its
            own.

    Raises:
        ConfigError: there is no transformer at `path`, its run is not finished or was lost, a file is damaged or does
            not fit the config, or the tokenizer is another one than the transformer was trained with.
        DataError: as `load_released`, of a checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        if weights != "ema":
            raise ConfigError(
                f"weights={weights!r} is for released checkpoints; {quoted(path)} holds one set of weights"
            )
        return _of_run(RunDirectory(path), path / "tokenizer" if tokenizer is None else Path(tokenizer))
    if not (path.is_file() and path.suffix in RELEASED_SUFFIXES):
        wrong = "is neither a folder nor a .ckpt, .pt or .pth file" if path.exists() else "does not exist"
        raise ConfigError(
            f"{quoted(path)} {wrong}; pass the folder of a transformer's finished run, or a released checkpoint file "
            f"(.ckpt)"
        )
    if tokenizer is not None:
        raise ConfigError(f"{quoted(path)} holds a tokenizer of its own; leave out {quoted(tokenizer)}")
    released = load_released(path, weights)
    if isinstance(released, Tokenizer):
        raise ConfigError(f"{quoted(path)} holds a tokenizer and no transformer; pass the checkpoint of a transformer")
    return released


def _of_run(run: RunDirectory, tokenizer_folder: Path) -> TrainedTransformer:
    config, folder = _config_of(run), quoted(run.path)
    if not run.finished:
        raise ConfigError(f"the run in {folder} is not finished; let its training go on to the end, or pass another")
    row = run.read_row()
    if row["status"] != "ok":
        raise ConfigError(
            f"the run in {folder} was lost ({row['status']}: {row.get('reason', 'no reason given')}); pass another"
        )
    tokenizer = load_tokenizer(tokenizer_folder)
    given_K, wanted_K = tokenizer.config.quantizer.codebook_size, config.quantizer.codebook_size
    digest, wanted_digest = tokenizer.digest(), str(row.get("tokenizer_sha256"))
    if given_K != wanted_K:
        mismatch = f"has {given_K:,} codes and the transformer in {folder} was trained on {wanted_K:,}"
    elif digest != wanted_digest:
        mismatch = (
            f"(sha256 {digest[:12]}) is not the one that the transformer in {folder} was trained with (sha256 "
            f"{wanted_digest[:12]})"
        )
    else:
        mismatch = ""
    if mismatch:
        raise ConfigError(f"the tokenizer in {quoted(tokenizer_folder)} {mismatch}; pass that one")
    return TrainedTransformer(
        _transformer(run.model, config.transformer_config), tokenizer, averaged=config.optim.ema_decay is not None
    )


def _config_of(run: RunDirectory) -> TransformerTrainConfig:
    """ConfigError: the folder holds no run, or a tokenizer's."""
    config = run.read_config()
    if not isinstance(config, TransformerTrainConfig):
        raise ConfigError(
            f"{quoted(run.path)} holds a tokenizer and no transformer; pass the folder of a transformer's run"
        )
    return config


def _transformer(path: Path, config: TransformerConfig) -> Transformer:
    """From a safetensors file. ConfigError: it is absent or damaged, or a tensor is missing, unknown or of another
    shape; one is named."""
    if not path.is_file():
        raise ConfigError(f"{quoted(path.parent)} holds no {path.name}; copy the run's folder whole, or pass another")
    try:
        tensors = unwrapped(path, load_file(path))
    except SafetensorError as error:
        raise ConfigError(
            f"{quoted(path)} is damaged ({one_line(error)}); copy it again, or pass another run"
        ) from None
    with torch.device("meta"):  # draws no random numbers, and no memory is taken twice
        transformer = Transformer(config)
    if why := misfit(tensors, transformer):
        raise ConfigError(f"{quoted(path)} does not fit the run's config.json: {why}; copy the run's folder whole")
    transformer.load_state_dict(tensors, assign=True)
    return transformer.eval()
