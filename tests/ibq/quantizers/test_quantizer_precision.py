"""Quantizers that were cast: accumulators stay float32, z_q has the type of the weights, codes stay bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from quantizer_variants import VARIANTS, features_for, make, train_step
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ibq import Tokenizer, build_quantizer
from ibq.config import TrainConfig
from ibq.errors import ConfigError
from ibq.quantizers.updates import Accumulator, kmeans

narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
EMA = {"method": "vq", "codebook_size": 2, "code_dim": 8, "ema_decay": 0.9, "beta_on": "commitment"}
ACCUMULATING = [name for name in VARIANTS if any(isinstance(m, Accumulator) for m in make(name).modules())]


@narrow
def test_moving_averages_of_a_cast_module_are_those_of_float32(dtype: torch.dtype) -> None:
    """In bfloat16 the counts stopped at 256 of some 4,000, and codes were 15 times too long."""
    found = []
    for cast in (torch.float32, dtype):
        torch.manual_seed(0)
        quantizer = build_quantizer(EMA | {"codebook_init": "normal"}).to(cast)
        for _ in range(30):
            quantizer(torch.randn(8, 8, 32, 32).to(dtype).to(cast) + 1)
        found.append((quantizer.moving_average.counts_K, quantizer.codebook.detach()))
    assert found[1][0].dtype == torch.float32
    torch.testing.assert_close(found[1][0], found[0][0], rtol=5e-3, atol=0)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("variant", ACCUMULATING)
@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.bfloat16(),
        lambda module: module.half(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.type(torch.float16),
        lambda module: copy.deepcopy(module).half().bfloat16(),
    ],
    ids=["bfloat16", "half", "to", "type", "copied and cast twice"],
)
def test_no_cast_touches_what_accumulates(variant: str, cast: object) -> None:
    quantizer = make(variant)
    for seed in (1, 2):
        train_step(quantizer, seed)
    before = {name: buffer.clone() for name, buffer in quantizer.named_buffers() if "." in name}
    after = dict(cast(quantizer).named_buffers())
    assert all(
        torch.equal(after[name], buffer) and after[name].dtype == buffer.dtype for name, buffer in before.items()
    )
    assert before


@pytest.mark.parametrize("variant", ACCUMULATING)
def test_a_default_dtype_touches_neither(variant: str) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        quantizer = make(variant)
    finally:
        torch.set_default_dtype(torch.float32)
    floating = [buffer for name, buffer in quantizer.named_buffers() if "." in name and buffer.is_floating_point()]
    assert all(buffer.dtype == torch.float32 for buffer in floating)


def test_double_makes_accumulators_wider() -> None:
    quantizer = make("vq ema restart").double()
    assert {b.dtype for b in quantizer.moving_average.buffers()} == {torch.float64, torch.bool}
    z_BDHW = features_for(quantizer).double()
    assert quantizer(z_BDHW).z_q.dtype == torch.float64
    assert quantizer.codebook.dtype == torch.float64


@pytest.mark.parametrize("variant", ["vq ema", "vq restart", "diveq"])
def test_accumulators_that_were_narrowed_behind_the_modules_back_are_one_sentence(variant: str) -> None:
    """As FSDP's MixedPrecision(buffer_dtype=torch.bfloat16) and load_state_dict(assign=True) do it."""
    quantizer = make(variant)
    state = {name: t.bfloat16() if t.is_floating_point() else t for name, t in quantizer.state_dict().items()}
    quantizer.load_state_dict(state, assign=True)
    with pytest.raises(ConfigError, match=r"accumulates and is torch\.bfloat16; keep buffers out of mixed precision"):
        quantizer(features_for(quantizer))


def test_a_state_dict_in_half_precision_is_read_into_float32() -> None:
    quantizer = make("vq ema")
    state = {name: t.half() if t.is_floating_point() else t for name, t in quantizer.state_dict().items()}
    quantizer.load_state_dict(state)
    assert quantizer.moving_average.sums_KD.dtype == torch.float32
    quantizer(features_for(quantizer))


@narrow
@pytest.mark.parametrize(
    "variant",
    [
        *("ibq", "vq ema", "vq cosine", "lfq", "bsq", "fsq", "simvq", "gumbel"),
        *("diveq", "diveq curve", "wasserstein", "vqbridge", "optvq", "nsvq"),
    ],
)
def test_a_whole_tokenizer_in_half_precision(variant: str, dtype: torch.dtype) -> None:
    quantizer = make(variant).config
    model = {"base_channels": 8, "norm_groups": 4, "z_channels": 8, "channel_multipliers": (1, 1), "res_blocks": 1}
    config = TrainConfig.parse({"quantizer": quantizer.model_dump(), "model": model})
    tokenizer, x_BCHW = Tokenizer(config).to(dtype), torch.rand(2, 1, 32, 32).to(dtype)
    images, _, quantized = tokenizer(x_BCHW)
    assert images.dtype == dtype
    (images.float().square().mean() + quantized.z_q.float().mean()).backward()
    tokenizer.eval()
    with torch.no_grad():
        indices = tokenizer.encode(x_BCHW)
        assert torch.equal(tokenizer.decode(indices), tokenizer(x_BCHW).images)


def test_codes_placed_by_hand_and_from_features_in_half_precision() -> None:
    quantizer = make("vq ema restart").bfloat16()
    features_MD = torch.randn(300, 6).bfloat16()
    quantizer.initialize_from(features_MD, torch.Generator().manual_seed(0))
    dead_K = torch.arange(64) < 5
    assert torch.equal(quantizer.restart_codes(dead_K, features_MD, torch.Generator().manual_seed(0)), dead_K)
    rows = {tuple(row) for row in features_MD.tolist()}
    assert all(tuple(code) in rows for code in quantizer.embedding[:5].tolist())
    assert torch.equal(quantizer.moving_average.sums_KD[:5], quantizer.embedding[:5].float())
    average = copy.deepcopy(quantizer)
    quantizer(features_for(quantizer))
    quantizer.sync_average(average)


def test_kmeans_of_half_precision_features_sums_in_float32() -> None:
    features_MD = (torch.randn(6000, 2) + 3).bfloat16()
    centers_KD = kmeans(features_MD, 2, torch.Generator().manual_seed(0))
    expected_KD = kmeans(features_MD.float(), 2, torch.Generator().manual_seed(0))
    assert torch.equal(centers_KD, expected_KD)


# --- FSDP2 ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def network(variant: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 1), make(variant), nn.Conv2d(6, 3, 1))


def reconstruct(model: nn.Sequential, x_BCHW: torch.Tensor) -> torch.Tensor:
    return model[2](model[1](model[0](x_BCHW)).z_q)


@pytest.mark.filterwarnings("ignore::UserWarning")  # FSDP's own, of an input without a gradient
def test_codes_that_a_forward_moves_are_not_sharded(mesh: DeviceMesh) -> None:
    """Sharded codes would forget what a forward has moved: those of an evaluation were off by .8."""
    for variant in ("vq ema", "vq restart", "diveq"):
        with pytest.raises(ConfigError, match=r"cannot be sharded; leave the quantizer out, fully_shard\(model"):
            fully_shard(network(variant), mesh=mesh)
    model, plain = network("vq ema"), network("vq ema")
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=set(model[1].parameters()))
    for seed in range(3):
        torch.manual_seed(seed)
        x_BCHW = torch.randn(2, 3, 4, 4)
        for each in (model, plain):
            reconstruct(each, x_BCHW)
    assert torch.equal(model.eval()[1].embedding, plain.eval()[1].embedding)
    torch.testing.assert_close(reconstruct(model, x_BCHW), reconstruct(plain, x_BCHW))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mixed_precision_of_fsdp_gives_the_next_layer_its_type(mesh: DeviceMesh) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network("ibq")

        def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
            return reconstruct(self.layers, x_BCHW)

    model = Model()
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    y_BCHW = model(torch.randn(2, 3, 4, 4))
    assert y_BCHW.dtype == torch.bfloat16
    y_BCHW.square().mean().backward()
