"""Sampling: a cache changes nothing, every sample has random numbers of its own, and what is drawn has the distribution
that is stated."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from sampling_oracles import all_images, exact_probabilities, network, reference_probabilities

from ibq.errors import ConfigError, NonFiniteError
from ibq.models.transformer import Transformer
from ibq.sampling import Guidance, Sampler, Sampling, draw, probabilities, random_numbers, sample_uncached

NUMBERS, CLASSES = torch.arange(7), torch.tensor([0, 1, 2, 0, 1, 2, 0])
GUIDED = Guidance(2.5)
CUT = Sampling(0.9, top_k=8, top_p=0.95, min_p=0.02, guidance=Guidance(3.0, "cosine", power=0.5))


def sample(
    transformer: Transformer, sampling: Sampling, seed: int = 0, batch_size: int = 7, **others: Any
) -> torch.Tensor:
    return Sampler(transformer, sampling, seed=seed, batch_size=batch_size, **others)(NUMBERS, CLASSES)


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    return network()


# --- The cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subtoken_bits", [(), (4,), (1, 2, 1)])
@pytest.mark.parametrize("sampling", [
    Sampling(),
    Sampling(temperature=0),
    Sampling(guidance=GUIDED),
    Sampling(temperature=0, guidance=GUIDED),
    CUT,
], ids=["plain", "greedy", "guided", "greedy-guided", "cut"])  # fmt: skip
def test_a_sample_is_that_of_full_passes_token_for_token(sampling: Sampling, subtoken_bits: tuple[int, ...]) -> None:
    transformer = network(codes=16, subtoken_bits=subtoken_bits)
    cached_BN = sample(transformer, sampling, seed=5)
    assert (cached_BN.shape, cached_BN.dtype) == ((7, 9), torch.int64)
    assert len(cached_BN.unique()) > 4
    assert torch.equal(cached_BN, sample_uncached(transformer, sampling, seed=5, numbers_B=NUMBERS, classes_B=CLASSES))


def test_a_compiled_sampler_gives_the_same_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, asked, real = network(depth=1, grid=2), [], torch.compile

    def compile_cheaply(module: torch.nn.Module, **options: Any) -> Any:
        asked.append(options)
        return real(module, backend="aot_eager", fullgraph=options["fullgraph"], dynamic=options["dynamic"])

    monkeypatch.setattr(torch, "compile", compile_cheaply)
    sampler = Sampler(transformer, CUT, seed=1, batch_size=7, compile=True)
    expected_BN = sample_uncached(transformer, CUT, seed=1, numbers_B=NUMBERS, classes_B=CLASSES)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(sampler(NUMBERS, CLASSES), expected_BN)
        assert torch.equal(sampler(NUMBERS[:3], CLASSES[:3]), expected_BN[:3])
        weaker = replace(CUT, guidance=Guidance(2.0, "linear"))
        weaker_BN = sample_uncached(transformer, weaker, seed=2, numbers_B=NUMBERS, classes_B=CLASSES)
        assert torch.equal(sample(transformer, weaker, seed=2, compile=True), weaker_BN), (
            "another guidance needs no other graph"
        )
    assert asked == [{"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}] * 2


def test_a_sampler_follows_the_weights(transformer: Transformer) -> None:
    changing = network()
    sampler = Sampler(changing, Sampling(), seed=0, batch_size=7)
    before_BN = sampler(NUMBERS, CLASSES)
    changing.load_state_dict(network(seed=1).state_dict())
    assert torch.equal(sampler(NUMBERS, CLASSES), sample(network(seed=1), Sampling()))
    changing.load_state_dict(transformer.state_dict())
    assert torch.equal(sampler(NUMBERS, CLASSES), before_BN)


@pytest.mark.parametrize("training", [True, False])
def test_sampling_is_in_eval_mode_without_gradients_and_leaves_the_mode(training: bool) -> None:
    transformer = network().requires_grad_().train(training)
    seen = []
    hook = transformer.head.register_forward_hook(lambda head, _, out: seen.append((head.training, out.requires_grad)))
    sample(transformer, Sampling())
    sample_uncached(transformer, Sampling(), seed=0, numbers_B=NUMBERS, classes_B=CLASSES)
    hook.remove()
    assert set(seen) == {(False, False)}
    assert {module.training for module in transformer.modules()} == {training}


def test_a_transformer_in_bfloat16_is_sampled_in_bfloat16() -> None:
    transformer, greedy = network().bfloat16(), Sampling(temperature=0, guidance=GUIDED)
    tokens_BN = sample(transformer, greedy)
    assert transformer.cache(1).parts[0].k_BHSE.dtype == torch.bfloat16
    expected_BN = sample_uncached(transformer, greedy, seed=0, numbers_B=NUMBERS, classes_B=CLASSES)
    assert (tokens_BN == expected_BN).double().mean() >= 0.9, (
        "rounding may decide between codes that are as good as equal"
    )
    assert len(tokens_BN.unique()) > 4


# --- Guidance ---------------------------------------------------------------------------------------------------------


def test_guidance_1_is_none_and_computes_no_unconditional_half(transformer: Transformer) -> None:
    rows: list[int] = []
    hook = transformer.blocks[0].attention.wqkv.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    none_BN = sample(transformer, Sampling())
    assert torch.equal(sample(transformer, Sampling(guidance=Guidance(1.0))), none_BN)
    assert torch.equal(sample(transformer, Sampling(guidance=Guidance(1.0, "linear"))), none_BN)
    assert set(rows) == {7}
    nowhere = Guidance(3.0, "interval", start=0.01, end=0.02)
    assert [nowhere.at(step, 9) for step in range(9)] == [1.0] * 9
    assert torch.equal(sample(transformer, Sampling(guidance=nowhere)), none_BN)
    hook.remove()
    assert rows[-9:] == [14] * 9


def test_guidance_changes_samples_and_guidance_0_forgets_the_class(transformer: Transformer) -> None:
    assert (sample(transformer, Sampling()) != sample(transformer, Sampling(guidance=GUIDED))).any()
    classless = Sampler(transformer, Sampling(guidance=Guidance(0.0)), seed=0, batch_size=7)
    assert torch.equal(classless(NUMBERS, CLASSES), classless(NUMBERS, (CLASSES + 1) % 3))


@pytest.mark.parametrize(("guidance", "scales"), [
    (Guidance(3.0), [3.0, 3.0, 3.0, 3.0, 3.0]),
    (Guidance(3.0, "linear"), [1.0, 1.5, 2.0, 2.5, 3.0]),
    (Guidance(0.0, "linear"), [1.0, 0.75, 0.5, 0.25, 0.0]),
    (Guidance(3.0, "cosine"), [1.0, 2 - math.sqrt(0.5), 2.0, 2 + math.sqrt(0.5), 3.0]),
    (Guidance(3.0, "cosine", power=2.0), [2 - math.cos(math.pi * r**2) for r in (0, 0.25, 0.5, 0.75, 1)]),
    (Guidance(3.0, "interval", start=0.2, end=0.6), [1.0, 3.0, 3.0, 1.0, 1.0]),
    (Guidance(3.0, "interval"), [3.0, 3.0, 3.0, 3.0, 3.0]),
])  # fmt: skip
def test_schedules_are_their_formulas(guidance: Guidance, scales: list[float]) -> None:
    assert [guidance.at(step, 5) for step in range(5)] == pytest.approx(scales, abs=1e-12)


def test_a_single_step_has_the_whole_scale() -> None:
    assert [Guidance(4.0, schedule).at(0, 1) for schedule in ("constant", "linear", "cosine", "interval")] == [4.0] * 4


# --- Random streams ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(), CUT], ids=["plain", "cut"])
def test_a_sample_does_not_depend_on_its_batch(transformer: Transformer, sampling: Sampling) -> None:
    together_BN = sample(transformer, sampling)
    alone, larger = (Sampler(transformer, sampling, seed=0, batch_size=batch_size) for batch_size in (1, 10))
    assert torch.equal(
        torch.cat([alone(n, c) for n, c in zip(NUMBERS.split(1), CLASSES.split(1), strict=True)]), together_BN
    )
    shuffled_B = torch.tensor([3, 6, 0, 1, 5, 2, 4])
    assert torch.equal(larger(NUMBERS[shuffled_B], CLASSES[shuffled_B]), together_BN[shuffled_B])
    assert torch.equal(larger(NUMBERS[:2], CLASSES[:2]), together_BN[:2])
    assert larger(NUMBERS[:0], CLASSES[:0]).shape == (0, 9)
    assert sample_uncached(transformer, sampling, seed=0, numbers_B=NUMBERS[:0], classes_B=CLASSES[:0]).shape == (0, 9)


def test_other_numbers_and_other_seeds_give_other_samples(transformer: Transformer) -> None:
    sampler = Sampler(transformer, Sampling(), seed=0, batch_size=40)
    same_class_BN = sampler(torch.arange(40), torch.zeros(40, dtype=torch.int64))
    assert len(same_class_BN.unique(dim=0)) == 40
    assert not torch.equal(sample(transformer, Sampling(), seed=1), sample(transformer, Sampling(), seed=0))


def test_streams_are_distinct_reproducible_and_uniform() -> None:
    seeds = [*range(12), 2**32, 2**63, 2**64 - 1]
    firsts = torch.cat([random_numbers(seed, [*range(12), 2**32, 2**63 - 1], 1) for seed in seeds])
    assert len(firsts.unique()) == firsts.numel()
    numbers_BC = random_numbers(3, range(200), 100)
    assert torch.equal(numbers_BC[7:9, :5], random_numbers(3, [7, 8], 5))
    assert numbers_BC.min() >= 0
    assert numbers_BC.max() < 1
    counts = numbers_BC.flatten().histc(20, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 19 + 4 * math.sqrt(2 * 19)
    assert abs(
        float(torch.corrcoef(torch.stack([numbers_BC[:-1].flatten(), numbers_BC[1:].flatten()]))[0, 1])
    ) < 4 / math.sqrt(19900)


def test_the_largest_random_number_takes_a_symbol_that_may_be_drawn() -> None:
    largest_B = torch.full((500,), 1 - 2.0**-52, dtype=torch.float64)
    logits_BK = torch.randn(500, 40, dtype=torch.float64)
    last_B = draw(logits_BK, largest_B, Sampling())
    assert (last_B == 39).all()
    cut = Sampling(top_k=3)
    allowed_BK = probabilities(logits_BK, cut) > 0
    assert torch.equal(draw(logits_BK, largest_B, cut), (allowed_BK * torch.arange(40)).amax(1))
    first_B = (allowed_BK * torch.arange(40, 0, -1)).argmax(1)
    assert torch.equal(draw(logits_BK, torch.zeros_like(largest_B), cut), first_B)


# --- Distributions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subtoken_bits", [(), (1, 1)])
@pytest.mark.parametrize("sampling", [
    Sampling(),
    Sampling(1.3, top_k=3, top_p=0.9, guidance=Guidance(1.5, "linear")),
], ids=["plain", "cut"])  # fmt: skip
def test_frequencies_are_the_exact_probabilities(sampling: Sampling, subtoken_bits: tuple[int, ...]) -> None:
    transformer, n = network(codes=4, grid=2, depth=1, subtoken_bits=subtoken_bits), 3000
    exact_M = exact_probabilities(transformer, 1, sampling)
    assert exact_M.sum() == pytest.approx(1, abs=1e-9)
    images_MN = all_images(transformer)
    sampler = Sampler(transformer, sampling, seed=0, batch_size=n)
    tokens_BN = sampler(torch.arange(n), torch.ones(n, dtype=torch.int64))
    observed_M = ((tokens_BN * 4 ** torch.arange(3, -1, -1)).sum(1)).bincount(minlength=len(images_MN))
    assert observed_M[exact_M == 0].sum() == 0
    often_M = n * exact_M >= 5
    observed, expected = (
        [*counts_M[often_M].tolist(), int(counts_M[~often_M].sum())] for counts_M in (observed_M, n * exact_M)
    )
    freedom = len(expected) - 1
    assert freedom > 10
    chi_square = sum((o - e) ** 2 / max(e, 1) for o, e in zip(observed, expected, strict=True))
    assert chi_square < freedom + 3.5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("top_k", [None, 1, 5, 12, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.7, 0.05])
@pytest.mark.parametrize("min_p", [0.0, 0.3])
def test_cuts_are_those_of_a_plain_loop(top_k: int | None, top_p: float, min_p: float) -> None:
    sampling = Sampling(0.7, top_k, top_p, min_p)
    generator = torch.Generator().manual_seed(0)
    logits_BK = torch.randn(30, 12, generator=generator, dtype=torch.float64)
    logits_BK[15:] = logits_BK[15:].round(decimals=0)  # equals at every border
    p_BK = probabilities(logits_BK, sampling)
    expected_BK = torch.tensor(
        [reference_probabilities(row, sampling) for row in logits_BK.tolist()], dtype=torch.float64
    )
    torch.testing.assert_close(p_BK / p_BK.sum(1, keepdim=True), expected_BK, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "only_the_best", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1 - 1e-12}, {"temperature": 1e-300}]
)
def test_what_leaves_only_the_best_is_greedy(only_the_best: dict[str, Any]) -> None:
    for transformer in (network(), network(codes=16, subtoken_bits=(2, 2))):
        greedy = partial(Sampling, guidance=GUIDED)
        assert torch.equal(sample(transformer, greedy(**only_the_best)), sample(transformer, greedy(temperature=0)))


def test_of_equals_greedy_and_top_k_1_take_the_first() -> None:
    new = Transformer(network().config)  # its head is zero
    for sampling in (Sampling(temperature=0), Sampling(top_k=1)):
        assert (sample(new, sampling) == 0).all()


def test_cuts_that_cut_nothing_change_nothing(transformer: Transformer) -> None:
    assert torch.equal(sample(transformer, Sampling(top_k=11)), sample(transformer, Sampling()))
    assert torch.equal(
        sample(transformer, Sampling(top_k=1000, top_p=1 - 1e-15, min_p=1e-300)), sample(transformer, Sampling())
    )


def test_a_high_temperature_is_uniform() -> None:
    p_BK = probabilities(torch.randn(3, 50, dtype=torch.float64), Sampling(temperature=1e9))
    torch.testing.assert_close(p_BK, torch.full_like(p_BK, 1 / 50), rtol=1e-7, atol=0)


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "message"), [
    ({"temperature": -0.5}, "temperature=-0.5 must be a finite number of at least 0; 0 is greedy"),
    ({"temperature": math.nan}, "temperature=nan must be a finite number of at least 0"),
    ({"temperature": math.inf}, "temperature=inf must be a finite number of at least 0"),
    ({"top_k": 0}, "top_k=0 must be at least 1, or None for all"),
    ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]; 1 is all"),
    ({"top_p": 1.1}, r"top_p=1.1 must be in \(0, 1\]"),
    ({"min_p": 1.0}, r"min_p=1.0 must be in \[0, 1\); 0 is all"),
    ({"min_p": -0.1}, r"min_p=-0.1 must be in \[0, 1\)"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        Sampling(**settings)


@pytest.mark.parametrize(("settings", "message"), [
    ({"scale": -1.0}, "guidance scale=-1.0 must be a finite number of at least 0; 1 is no guidance"),
    ({"scale": math.nan}, "guidance scale=nan must be a finite number"),
    ({"schedule": "cosin"}, "schedule='cosin' of guidance is not known; did you mean 'cosine'?"),
    ({"schedule": "cosine", "power": 0.0}, "guidance power=0.0 must be a finite number above 0"),
    ({"schedule": "linear", "power": 2.0}, "guidance power=2.0 is of schedule 'cosine', and schedule is 'linear'; "
                                           "leave it at 1"),
    ({"schedule": "interval", "start": 0.5, "end": 0.5}, "guidance from start=0.5 to end=0.5 is no interval; choose 0 "
                                                         "<= start < end <= 1"),
    ({"schedule": "interval", "start": -0.5}, "guidance from start=-0.5 to end=1.0 is no interval"),
    ({"schedule": "interval", "end": 1.5}, "guidance from start=0.0 to end=1.5 is no interval"),
    ({"start": 0.5}, "guidance from start=0.5 to end=1.0 is of schedule 'interval', and schedule is 'constant'; leave "
                     "them at 0 and 1"),
])  # fmt: skip
def test_guidance_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        Guidance(**settings)


@pytest.mark.parametrize(("numbers", "classes", "message"), [
    ([0], [3], "class 3 is not one of the transformer's 3; choose from 0 to 2"),
    ([0, 1], [0, -1], "class -1 is not one of the transformer's 3; choose from 0 to 2"),
    ([0, -4], [0, 0], "-4 is no sample's number; they count from 0"),
    ([0, 1], [0], r"numbers of shape \(2,\) and classes of shape \(1,\) do not fit; pass \(B,\) and \(B,\)"),
])  # fmt: skip
def test_samples_that_cannot_be_are_refused(
    transformer: Transformer, numbers: list[int], classes: list[int], message: str
) -> None:
    numbers_B, classes_B = torch.tensor(numbers), torch.tensor(classes)
    with pytest.raises(ConfigError, match=f"^{message}$"):
        Sampler(transformer, Sampling(), seed=0, batch_size=2)(numbers_B, classes_B)
    with pytest.raises(ConfigError, match=f"^{message}$"):
        sample_uncached(transformer, Sampling(), seed=0, numbers_B=numbers_B, classes_B=classes_B)


def test_a_sampler_that_cannot_be_is_refused(transformer: Transformer) -> None:
    with pytest.raises(ConfigError, match=r"^7 samples do not fit into batch_size=6; pass fewer at a time$"):
        sample(transformer, Sampling(), batch_size=6)
    with pytest.raises(ConfigError, match=r"^batch_size=0 must be at least 1$"):
        sample(transformer, Sampling(), batch_size=0)
    with pytest.raises(ConfigError, match=r"^seed=-1 must be in \[0, 2\*\*64\)$"):
        sample(transformer, Sampling(), seed=-1)


def assert_refused_and_forgotten(transformer: Transformer, weight: torch.Tensor, message: str) -> None:
    """With NaN in this part of the weights; with the weights as they were before, the same sampler gives the same
    samples again."""
    sampling, numbers_B = Sampling(guidance=GUIDED), NUMBERS + 20
    sampler = Sampler(transformer, sampling, seed=0, batch_size=9)
    before_BN, kept = sampler(numbers_B, CLASSES), weight.clone()
    weight.fill_(math.nan)
    with pytest.raises(NonFiniteError, match=message):
        sampler(numbers_B, CLASSES)
    with pytest.raises(NonFiniteError, match=message):
        sample_uncached(transformer, sampling, seed=0, numbers_B=numbers_B, classes_B=CLASSES)
    weight.copy_(kept)
    assert torch.equal(sampler(numbers_B, CLASSES), before_BN)


def test_logits_that_are_not_finite_are_refused_at_their_step(transformer: Transformer) -> None:
    tokens_BN = Sampler(transformer, Sampling(guidance=GUIDED), seed=0, batch_size=9)(NUMBERS + 20, CLASSES)
    token = int(tokens_BN[3, 4])
    step, b = (tokens_BN == token).T.nonzero()[0].tolist()
    message = (
        f"^the transformer's logits of sample {20 + b} are not finite at step {step + 1}, counted from 0; its "
        f"weights are damaged, or"
    )
    assert_refused_and_forgotten(transformer, transformer.tok_emb.weight[token], message)


def test_logits_of_a_subtoken_that_are_not_finite_are_refused() -> None:
    transformer = network(codes=16, subtoken_bits=(2, 2))
    message = "^the transformer's logits of sample 20 are not finite at step 0, counted from 0"
    assert_refused_and_forgotten(transformer, transformer.head.outputs[1].weight, message)
