"""The transformer: the paper's sizes and initialisation, and every module type against the formulas of docs/method.md
section 6, in float64, with imported weights; the formulas read the file's tensors by their released names and use no
layer of torch.nn.
"""

from __future__ import annotations

import math

import pytest
import released_layout
import torch
from released_layout import CLASSES, CODES, DEPTH, Tensors

from ibq import TrainedTransformer, load_released
from ibq.errors import ConfigError
from ibq.models.config import SIZES, TransformerConfig
from ibq.models.transformer import Transformer, build_transformer

WIDTH = 64 * DEPTH
GRID = 64  # 256 pixels at the small tokenizer's factor of 4


# --- Sizes and initialisation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "depth", "width", "parameters"), [
    ("B", 16, 1024, 342_994_944),
    ("L", 20, 1280, 649_640_960),
    ("XL", 24, 1536, 1_076_103_168),
    ("XXL", 30, 1920, 2_063_331_840),
])  # fmt: skip
def test_parameter_counts_are_the_papers(size: str, depth: int, width: int, parameters: int) -> None:
    with torch.device("meta"):
        transformer = build_transformer(size)
    assert (transformer.config.depth, transformer.config.width) == (depth, width)
    assert transformer.config.codebook_size == 16384
    assert sum(parameter.numel() for parameter in transformer.parameters()) == parameters


@pytest.mark.parametrize(("size", "gamma_scale"), [("S", 1e-3), ("B", 1e-3), ("L", 1e-3), ("XL", 1e-4), ("XXL", 1e-5)])
def test_gammas_begin_smaller_in_larger_models(size: str, gamma_scale: float) -> None:
    assert TransformerConfig(depth=SIZES[size]).gamma_scale == gamma_scale


def test_initialisation() -> None:
    transformer = build_transformer("XS", codebook_size=64, classes=9, grid=4)
    width = transformer.config.width
    for name, parameter in transformer.state_dict().items():
        if name == "head.weight" or name.endswith(".bias"):
            assert parameter.abs().max() == 0, name
        elif name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("ada_lin.1.weight"):
            gammas = 2 * width if name.startswith("blocks") else 0
            assert float(parameter[gammas:].std()) == pytest.approx(0.01, rel=0.03), name
            if gammas:
                assert float(parameter[:gammas].std()) == pytest.approx(0.02e-3, rel=0.03), name
        else:
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.1), name


def test_a_new_transformer_gives_equal_logits() -> None:
    transformer = build_transformer("XXS", codebook_size=7, classes=3, grid=2)
    logits_BSK = transformer(torch.tensor([[1, 2, 3]]), torch.tensor([0]))
    assert logits_BSK.shape == (1, 4, 7)
    assert logits_BSK.abs().max() == 0


# --- The formulas -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    path = released_layout.write(
        tmp_path_factory.mktemp("released") / "transformer.ckpt", released_layout.transformer_state()
    )
    transformer = load_released(path)
    assert isinstance(transformer, TrainedTransformer)
    return transformer.transformer.double().requires_grad_(False)


@pytest.fixture(scope="module")
def w() -> Tensors:
    return {name: tensor.double() for name, tensor in released_layout.transformer_network().items()}


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def sequence(length: int) -> torch.Tensor:
    return torch.randn(2, length, WIDTH, dtype=torch.float64)


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + (-x).exp())


def rms_norm(w: Tensors, name: str, x_BSW: torch.Tensor) -> torch.Tensor:
    return x_BSW / ((x_BSW**2).mean(2, keepdim=True) + 1e-5) ** 0.5 * w[f"{name}.weight"]


def rotated(vector_E: torch.Tensor, position: int, grid: int) -> torch.Tensor:
    """RoPE as multiplication of complex numbers: pair p of a half turns by coordinate * 10000^(-p / 16); zero at the
    class position."""
    if position == 0:
        return torch.zeros_like(vector_E)
    row, column = divmod(position - 1, grid)
    turned = []
    for pair in range(32):
        coordinate, exponent = (row, pair / 16) if pair < 16 else (column, (pair - 16) / 16)
        angle = coordinate * 10000**-exponent
        z = complex(float(vector_E[2 * pair]), float(vector_E[2 * pair + 1])) * complex(
            math.cos(angle), math.sin(angle)
        )
        turned += [z.real, z.imag]
    return torch.tensor(turned, dtype=torch.float64)


def attention(w: Tensors, name: str, x_BSW: torch.Tensor, grid: int) -> torch.Tensor:
    """Head by head and query by query, over the keys up to it."""
    q_BSW, k_BSW, v_BSW = (x_BSW @ w[f"{name}.wqkv.weight"].T).split(WIDTH, dim=2)
    out_BSW = torch.zeros_like(x_BSW)
    for b in range(len(x_BSW)):
        for e in (slice(64 * head, 64 * (head + 1)) for head in range(DEPTH)):
            q_SE = torch.stack([rotated(q_E, s, grid) for s, q_E in enumerate(q_BSW[b, :, e])])
            k_SE = torch.stack([rotated(k_E, s, grid) for s, k_E in enumerate(k_BSW[b, :, e])])
            for s in range(x_BSW.shape[1]):
                weights = ((k_SE[: s + 1] @ q_SE[s]) / 8).exp()
                out_BSW[b, s, e] = (weights / weights.sum()) @ v_BSW[b, : s + 1, e]
    return out_BSW @ w[f"{name}.wo.weight"].T


def feed_forward(w: Tensors, name: str, x_BSW: torch.Tensor) -> torch.Tensor:
    w1, w2, w3 = (w[f"{name}.w{i}.weight"] for i in (1, 2, 3))
    return (silu(x_BSW @ w1.T) * (x_BSW @ w3.T)) @ w2.T


def modulation(w: Tensors, name: str, condition_BW: torch.Tensor) -> list[torch.Tensor]:
    out_BV = silu(condition_BW) @ w[f"{name}.1.weight"].T + w[f"{name}.1.bias"]
    return [out_BV[:, None, i : i + WIDTH] for i in range(0, out_BV.shape[1], WIDTH)]


def block(w: Tensors, name: str, x_BSW: torch.Tensor, condition_BW: torch.Tensor, grid: int) -> torch.Tensor:
    gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation(w, f"{name}.ada_lin", condition_BW)
    modulated = rms_norm(w, f"{name}.attention_norm", x_BSW) * (1 + scale1) + shift1
    x_BSW = x_BSW + gamma1 * attention(w, f"{name}.attention", modulated, grid)
    modulated = rms_norm(w, f"{name}.ffn_norm", x_BSW) * (1 + scale2) + shift2
    return x_BSW + gamma2 * feed_forward(w, f"{name}.feed_forward", modulated)


def head_norm(w: Tensors, x_BSW: torch.Tensor, condition_BW: torch.Tensor) -> torch.Tensor:
    scale, shift = modulation(w, "head_nm.ada_lin", condition_BW)
    return rms_norm(w, "head_nm.rmsnorm", x_BSW) * (1 + scale) + shift


def whole(w: Tensors, tokens_BT: torch.Tensor, classes_B: torch.Tensor, grid: int) -> torch.Tensor:
    condition_BW = w["class_emb.embedding_table.weight"][classes_B]
    x_BSW = torch.cat([condition_BW[:, None], w["tok_emb.weight"][tokens_BT]], dim=1)
    for i in range(DEPTH):
        x_BSW = block(w, f"blocks.{i}", x_BSW, condition_BW, grid)
    return head_norm(w, x_BSW, condition_BW) @ w["head.weight"].T


# --- Modules against formulas -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_a_small_grid(transformer: Transformer) -> Transformer:
    """The imported weights on a grid of 3 x 3, in which a short sequence has several rows."""
    small = Transformer(transformer.config.model_copy(update={"grid": 3})).double().eval().requires_grad_(False)
    small.load_state_dict(transformer.state_dict())
    return small


@pytest.mark.parametrize("name", ["blocks.0.attention_norm", "blocks.1.ffn_norm", "head_nm.rmsnorm"])
def test_rms_norm(transformer: Transformer, w: Tensors, name: str) -> None:
    x_BSW = sequence(3) * 1e-2  # so small that eps counts
    assert_same(transformer.get_submodule(name)(x_BSW), rms_norm(w, name, x_BSW))


def test_attention(on_a_small_grid: Transformer, w: Tensors) -> None:
    x_BSW, seen = sequence(10), []
    attention_1 = on_a_small_grid.blocks[1].attention
    hook = attention_1.register_forward_hook(lambda _, given, out: seen.append((*given, out)))
    on_a_small_grid(torch.randint(0, CODES, (2, 8)), torch.tensor([0, 1]))
    hook.remove()
    ((given_BSW, rotation_2SP, out_BSW),) = seen
    assert_same(out_BSW, attention(w, "blocks.1.attention", given_BSW, grid=3))
    assert_same(attention_1(x_BSW[:, :9], rotation_2SP), attention(w, "blocks.1.attention", x_BSW[:, :9], grid=3))


def test_the_class_position_sends_no_signal_but_its_value(on_a_small_grid: Transformer, w: Tensors) -> None:
    """Its query is zero, so it takes the mean of what it sees, itself; its key is zero, so others give it a logit of
    0."""
    x_BSW = sequence(1)
    v_BSW = (x_BSW @ w["blocks.0.attention.wqkv.weight"].T)[..., 2 * WIDTH :]
    rotation_2SP = torch.zeros(2, 1, 32, dtype=torch.float64)
    assert_same(on_a_small_grid.blocks[0].attention(x_BSW, rotation_2SP), v_BSW @ w["blocks.0.attention.wo.weight"].T)


def test_feed_forward(transformer: Transformer, w: Tensors) -> None:
    x_BSW = sequence(4)
    assert_same(transformer.blocks[0].feed_forward(x_BSW), feed_forward(w, "blocks.0.feed_forward", x_BSW))


@pytest.mark.parametrize(
    ("depth", "hidden"), [(1, 256), (2, 512), (3, 512), (4, 768), (6, 1024), (16, 2816), (30, 5120)]
)
def test_the_hidden_width_is_two_thirds_of_four_widths_in_steps_of_256(depth: int, hidden: int) -> None:
    assert TransformerConfig(depth=depth).ffn_width == hidden == math.ceil(int(8 * 64 * depth / 3) / 256) * 256


@pytest.mark.parametrize(("name", "parts"), [("blocks.0.ada_lin", 6), ("head_nm.ada_lin", 2)])
def test_modulation(transformer: Transformer, w: Tensors, name: str, parts: int) -> None:
    condition_BW = sequence(3)[:, 0]
    given = transformer.get_submodule(name)(condition_BW)
    assert len(given) == parts
    for actual, expected in zip(given, modulation(w, name, condition_BW), strict=True):
        assert_same(actual, expected)


def test_block(on_a_small_grid: Transformer, w: Tensors) -> None:
    seen: list[tuple[torch.Tensor, ...]] = []
    hook = on_a_small_grid.blocks[0].register_forward_hook(lambda _, given, out: seen.append((*given, out)))
    on_a_small_grid(torch.randint(0, CODES, (2, 7)), torch.tensor([2, 4]))
    hook.remove()
    ((x_BSW, condition_BW, _, out_BSW),) = seen
    assert_same(out_BSW, block(w, "blocks.0", x_BSW, condition_BW, grid=3))


def test_head_norm(transformer: Transformer, w: Tensors) -> None:
    x_BSW, condition_BW = sequence(4), sequence(1)[:, 0]
    assert_same(transformer.head_nm(x_BSW, condition_BW), head_norm(w, x_BSW, condition_BW))


@pytest.mark.parametrize("length", [0, 1, 8])
def test_transformer_whole(on_a_small_grid: Transformer, w: Tensors, length: int) -> None:
    tokens_BT, classes_B = (
        torch.randint(0, CODES, (2, length)),
        torch.tensor([3, CLASSES]),
    )  # the last is the unconditional class
    logits_BSK = on_a_small_grid(tokens_BT, classes_B)
    assert logits_BSK.shape == (2, length + 1, CODES)
    assert_same(logits_BSK, whole(w, tokens_BT, classes_B, grid=3))


def test_the_imported_grid_is_that_of_the_tokenizer(transformer: Transformer, w: Tensors) -> None:
    tokens_BT, classes_B = torch.randint(0, CODES, (1, 66)), torch.tensor([1])  # two rows of the grid, and a little
    assert transformer.config.grid == GRID
    assert_same(transformer(tokens_BT, classes_B), whole(w, tokens_BT, classes_B, GRID))


# --- Step by step -----------------------------------------------------------------------------------------------------


def test_steps_with_a_cache_are_the_full_pass(on_a_small_grid: Transformer) -> None:
    cache = on_a_small_grid.cache(3)
    for classes in ([0, 2, CLASSES], [1, 1, 0]):  # the same cache again, for other sequences
        tokens_BN, classes_B = torch.randint(0, CODES, (3, 9)), torch.tensor(classes)
        on_a_small_grid.begin(classes_B, cache)
        hidden_BSW = on_a_small_grid.hidden(tokens_BN[:, :-1], classes_B)
        for position in range(9):
            before_B = tokens_BN[:, position - 1]  # at the class position any
            assert_same(on_a_small_grid.step(before_B, torch.tensor(position), cache), hidden_BSW[:, position])


def test_a_cache_is_of_the_transformers_precision_and_no_part_of_a_state(on_a_small_grid: Transformer) -> None:
    cache = on_a_small_grid.cache(2)
    assert cache.state_dict() == {}
    assert {part.k_BHSE.dtype for part in cache.parts} == {torch.float64}
    assert cache.parts[0].v_BHSE.shape == (2, DEPTH, 9, 64)


# --- Behaviour --------------------------------------------------------------------------------------------------------


def test_no_prediction_sees_its_token_or_a_later_one(on_a_small_grid: Transformer) -> None:
    tokens_BT, classes_B = torch.randint(0, CODES, (1, 8)), torch.tensor([1])
    before = on_a_small_grid(tokens_BT, classes_B)
    changed = tokens_BT.clone()
    changed[0, 4] = (changed[0, 4] + 1) % CODES
    after = on_a_small_grid(changed, classes_B)
    assert torch.equal(after[:, :5], before[:, :5])
    assert (after[:, 5:] != before[:, 5:]).all(dim=2).all()


def test_dropout_is_of_training_alone_and_of_every_place() -> None:
    tokens_BT, classes_B = torch.randint(0, 8, (4, 15)), torch.zeros(4, dtype=torch.int64)
    off = {"token_dropout": 0.0, "attention_dropout": 0.0, "ffn_dropout": 0.0, "class_dropout": 0.0}

    def draws_differ(**on: float) -> bool:
        torch.manual_seed(0)
        network = Transformer(TransformerConfig(depth=1, codebook_size=8, classes=2, grid=4, **(off | on)))
        torch.nn.init.normal_(network.head.weight)
        assert torch.equal(network.eval()(tokens_BT, classes_B), network(tokens_BT, classes_B))
        network.train()
        return not torch.equal(network(tokens_BT, classes_B), network(tokens_BT, classes_B))

    assert not draws_differ()
    for place in off:
        assert draws_differ(**{place: 0.5}), place


def test_a_dropped_class_is_the_unconditional_one() -> None:
    embedding = build_transformer("XXS", codebook_size=8, classes=3, grid=2).class_emb.train()
    labels_B = torch.zeros(4000, dtype=torch.int64)
    dropped_B = (embedding(labels_B) == embedding.embedding_table.weight[3]).all(1)
    kept_B = (embedding(labels_B) == embedding.embedding_table.weight[0]).all(1)
    assert 0.08 < dropped_B.double().mean() < 0.12
    assert 0.88 < kept_B.double().mean() < 0.92


def test_every_parameter_receives_a_gradient_once_the_head_is_not_zero() -> None:
    transformer = build_transformer("XXS", codebook_size=8, classes=3, grid=3)
    torch.nn.init.normal_(transformer.head.weight)
    logits_BSK = transformer(torch.randint(0, 8, (4, 8)), torch.tensor([0, 1, 2, 3]))
    torch.nn.functional.cross_entropy(logits_BSK.flatten(0, 1), torch.randint(0, 8, (36,))).backward()
    for name, parameter in transformer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("tokens", "classes", "message"),
    [
        (
            torch.zeros(2, 9, dtype=torch.int64),
            [0, 0],
            "9 tokens leave nothing to predict on a grid of 3 x 3; pass at most 8, all but the last",
        ),
        (torch.tensor([[0, 12]]), [0], r"tokens reach from 0 to 12; they must lie in \[0, 12\)"),
        (torch.tensor([[-1, 0]]), [0], r"tokens reach from -1 to 0; they must lie in \[0, 12\)"),
        (torch.tensor([[1]]), [6], r"classes reach from 6 to 6; they must lie in \[0, 6\)"),
        (
            torch.tensor([[1]]),
            [0, 1],
            r"tokens of shape \(1, 1\) and classes of shape \(2,\) do not fit; pass \(B, T\) and \(B,\)",
        ),
        (torch.tensor([1]), [0], r"tokens of shape \(1,\) and classes of shape \(1,\) do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(
    on_a_small_grid: Transformer, tokens: torch.Tensor, classes: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        on_a_small_grid(tokens, torch.tensor(classes))


def test_unknown_sizes_and_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^size='XLL' is not a size of the transformer; did you mean 'XL'\?"):
        build_transformer("XLL")
    with pytest.raises(ConfigError, match=r"^grid: Input should be greater than or equal to 1 \(given 0\)$"):
        build_transformer("B", grid=0)
    with pytest.raises(ConfigError, match=r"^classes: .* \(given 0\)$"):
        build_transformer("B", classes=0)
