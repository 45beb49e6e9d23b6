"""Weights of networks that were wrapped when they were saved, bare files of tensors, and files that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from released_layout import sentence, tokenizer_state, transformer_state, write
from safetensors.torch import load_file, save_file

from ibq import Tokenizer, TrainedTransformer, load_released, load_tokenizer
from ibq.cli.common import read_tokenizer
from ibq.config import TrainConfig
from ibq.errors import ConfigError

WRAPPED = {
    "module.": "DistributedDataParallel",
    "_orig_mod.": "torch.compile",
    "module._orig_mod.": "DistributedDataParallel and torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
}


@pytest.mark.parametrize("prefix", WRAPPED)
@pytest.mark.parametrize("bare", [False, True])
def test_a_released_file_of_a_wrapped_network(
    prefix: str, bare: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tokenizer_state()
    plain, path = load_released(write(tmp_path / "plain.ckpt", state)), tmp_path / ("bare.pth" if bare else "file.ckpt")
    wrapped = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    torch.save(wrapped if bare else {"state_dict": wrapped}, path)
    loaded, _ = read_tokenizer(path)
    assert loaded.digest() == plain.digest()
    word = f"{path}: weights of a network wrapped by {WRAPPED[prefix]}, read as the network's own\n"
    assert capsys.readouterr().err == word


def test_a_transformer_compiled_by_parts(tmp_path: Path) -> None:
    state = transformer_state()
    torch.save(
        {name.replace("transformer.", "transformer._orig_mod.", 1): of for name, of in state.items()}, tmp_path / "a.pt"
    )
    parts, plain = load_released(tmp_path / "a.pt"), load_released(write(tmp_path / "plain.ckpt", state))
    assert isinstance(parts, TrainedTransformer)
    assert isinstance(plain, TrainedTransformer)
    assert parts.digest() == plain.digest()


def test_wrapped_and_plain_weights_in_one_file_are_refused(tmp_path: Path) -> None:
    state = tokenizer_state()
    name = next(iter(state))
    said = sentence(write(tmp_path / "a.ckpt", state | {f"module.{name}": state[name]}))
    assert said.endswith("holds weights both of a network wrapped by DistributedDataParallel and of a plain one")


def saved(tmp_path: Path) -> tuple[Tokenizer, Path]:
    model = {"base_channels": 4, "channel_multipliers": [1, 2], "z_channels": 4, "norm_groups": 2, "res_blocks": 1}
    tokenizer = Tokenizer(TrainConfig.parse({"model": model, "quantizer": {"method": "ibq", "codebook_size": 8}}))
    tokenizer.save(tmp_path)
    return tokenizer, tmp_path / "model.safetensors"


def test_a_saved_folder_of_a_compiled_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, path = saved(tmp_path)
    save_file(torch.compile(tokenizer).state_dict(), path)
    assert all(name.startswith("_orig_mod.") for name in load_file(path))
    assert load_tokenizer(tmp_path).digest() == tokenizer.digest()
    assert "wrapped by torch.compile" in capsys.readouterr().err


def test_a_file_that_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    tokenizer, path = saved(tmp_path)
    save_file({f"net.{name}": tensor for name, tensor in tokenizer.state_dict().items()}, path)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(tmp_path)
    count = 2 * len(tokenizer.state_dict())
    assert str(caught.value) == (
        f"{path} does not hold this config's weights: 'encoder.conv_in.weight' is absent there and has the shape "
        f"(4, 1, 3, 3) in the network ({count} of {count} tensors do not fit); pass the folder as it was saved"
    )
