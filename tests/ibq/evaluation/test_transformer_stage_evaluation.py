"""Evaluation of a transformer: its numbers against plain computations, what is sampled once, and why numbers are
absent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_transformer import CONFIG, build, fashion
from training_runs import stop_after

import ibq.evaluation.transformer as module
import ibq.metrics.distances as distances_module
from ibq.data import Images
from ibq.data.tokens import Tokens, encode_split
from ibq.errors import ConfigError, DataError, NonFiniteError
from ibq.evaluation.tokenizer import PerceptualEvaluation, UnfitError
from ibq.evaluation.transformer import evaluate_samples, evaluate_transformer
from ibq.metrics.distances import NAMES, distances, to_uint8
from ibq.models.tokenizer import Tokenizer
from ibq.models.transformer import Transformer
from ibq.pretrained.fashion_cnn import load_fashion_cnn
from ibq.sampling import Guidance, Sampler, Sampling, sample_uncached
from ibq.training.runtime import Runtime, StopRequested

N_IMAGES, SAMPLES, PART, T, K = 130, 115, 50, 16, 32
RUNTIME = Runtime(device="cpu", eval_images=N_IMAGES, eval_batch_size=40, samples=SAMPLES, guidances=(1.0, 2.5))
OF_SAMPLES = (*NAMES, "label_agreement")

Evaluated = tuple[dict[str, float], dict[str, Any], dict[str, torch.Tensor]]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    fashion(1)  # before the cache that it may lie in is another
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IBQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(module, "PART", PART)
        yield


@pytest.fixture(scope="module")
def images() -> Images:
    return fashion(N_IMAGES + 20)


@pytest.fixture(scope="module")
def networks() -> tuple[Transformer, Tokenizer]:
    return build()


@pytest.fixture(scope="module")
def tokens(networks: tuple[Transformer, Tokenizer], images: Images) -> Tokens:
    return encode_split(networks[1], images, classes=10)


Evaluate = Callable[..., Evaluated]


@pytest.fixture(scope="module")
def evaluate(networks: tuple[Transformer, Tokenizer], images: Images, tokens: Tokens) -> Evaluate:
    def evaluated(
        folder: Path, runtime: Runtime = RUNTIME, beat: Callable[[], bool] = lambda: False, **given: Any
    ) -> Evaluated:
        transformer, tokenizer = given.get("networks", networks)
        return evaluate_transformer(
            CONFIG, transformer, tokenizer, given.get("images", images), tokens, runtime, folder, beat
        )

    return evaluated


@pytest.fixture(scope="module")
def whole(evaluate: Evaluate, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    return evaluate(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Numbers of the samples that were asked for, call by call."""
    calls: list[list[int]] = []
    sampler = Sampler.__call__

    def counted(self: Sampler, numbers_B: torch.Tensor, classes_B: torch.Tensor) -> torch.Tensor:
        calls.append(numbers_B.tolist())
        return sampler(self, numbers_B, classes_B)

    monkeypatch.setattr(Sampler, "__call__", counted)
    return calls


# --- Numbers ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_cross_entropy_is_that_of_all_logits(
    whole: Evaluated, networks: tuple[Transformer, Tokenizer], tokens: Tokens
) -> None:
    metrics, protocol, _ = whole
    transformer = networks[0].double().eval()
    tokens_NT, labels_N = tokens.tokens_NT[:N_IMAGES].long(), tokens.labels_N[:N_IMAGES]
    logits_NTK = transformer(tokens_NT[:, :-1], labels_N)
    networks[0].float().train()
    nats = float(torch.nn.functional.cross_entropy(logits_NTK.flatten(0, 1), tokens_NT.flatten()))
    assert metrics["cross_entropy"] == pytest.approx(nats, rel=1e-6)
    assert nats > 1.1 * math.log(K), "of a transformer that is wrong with confidence"
    assert metrics["bits_per_image"] == pytest.approx(T * nats / math.log(2), rel=1e-6)
    assert metrics["uniform_bits_per_image"] == T * 5
    assert protocol["cross_entropy"] == f"nats a token given those before it, over the first {N_IMAGES} images"


def test_a_model_that_knows_nothing_needs_the_bits_of_uniform_tokens(evaluate: Evaluate, tmp_path: Path) -> None:
    fresh = Transformer(CONFIG.transformer_config), build()[1]  # whose head begins at zero
    metrics, protocol, tensors = evaluate(tmp_path, Runtime(eval_images=50, samples=0), networks=fresh)
    assert metrics["bits_per_image"] == pytest.approx(T * math.log2(K), rel=1e-6)
    assert metrics.keys() == {"cross_entropy", "bits_per_image", "uniform_bits_per_image"}
    assert protocol["distances[fashion-cnn]"] == "absent: samples=0 at 5 guidances are asked for"
    assert tensors == {}
    assert fresh[0].training


def test_samples_are_those_of_the_uncached_loop(whole: Evaluated, networks: tuple[Transformer, Tokenizer]) -> None:
    _, _, tensors = whole
    assert tensors["classes_N"].tolist() == [number % 10 for number in range(SAMPLES)]
    numbers_B = torch.tensor([0, 57, 114])
    for g in (1.0, 2.5):
        tokens_NT = tensors[f"tokens@{g:g}"]
        assert (tokens_NT.dtype, tokens_NT.shape) == (torch.int32, (SAMPLES, T))
        expected_BT = sample_uncached(
            networks[0],
            Sampling(guidance=Guidance(g)),
            seed=5,
            numbers_B=numbers_B,
            classes_B=tensors["classes_N"][numbers_B],
        )
        assert tokens_NT[numbers_B].tolist() == expected_BT.tolist()
    assert not torch.equal(tensors["tokens@1"], tensors["tokens@2.5"])


@torch.no_grad()
def test_distances_and_label_agreement_are_those_of_the_decoded_samples(
    whole: Evaluated, networks: tuple[Transformer, Tokenizer], images: Images
) -> None:
    metrics, protocol, tensors = whole
    tokenizer, network = networks[1].eval(), load_fashion_cnn()
    references_NF, _ = network(images.images_NCHW[:N_IMAGES])
    for g in (1.0, 2.5):
        pictures_NCHW = to_uint8(tokenizer.decode(tensors[f"tokens@{g:g}"].view(-1, 4, 4)))
        features_NF, logits_NL = network(pictures_NCHW)
        expected, absent = distances(features_NF, logits_NL, references_NF)
        assert absent == {}
        for name in NAMES:
            assert metrics[f"{name}[fashion-cnn]@{g:g}"] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name
        hits = sum(int(logits_L.argmax()) == number % 10 for number, logits_L in enumerate(logits_NL))
        assert metrics[f"label_agreement[fashion-cnn]@{g:g}"] == pytest.approx(hits / SAMPLES, abs=1e-12)
        shown_NCHW = tensors[f"images@{g:g}"]
        assert (shown_NCHW.float() - pictures_NCHW[tensors["shown_N"]].float()).abs().max() <= 1
    assert tensors["shown_N"].tolist() == list(range(100))
    assert protocol["distances[fashion-cnn]"].startswith("torch-fidelity ")
    assert f"{SAMPLES} uint8 images against {N_IMAGES}" in protocol["distances[fashion-cnn]"]


def test_plain_names_are_of_the_guidance_with_the_lowest_fid(whole: Evaluated) -> None:
    metrics, protocol, _ = whole
    best = min((1.0, 2.5), key=lambda g: metrics[f"fid[fashion-cnn]@{g:g}"])
    assert metrics["guidance"] == best
    assert metrics["fid[fashion-cnn]@1"] != metrics["fid[fashion-cnn]@2.5"]
    for name in OF_SAMPLES:
        assert metrics[f"{name}[fashion-cnn]"] == metrics[f"{name}[fashion-cnn]@{best:g}"]
    assert protocol["guidance"].startswith("lowest fid[fashion-cnn] of 1, 2.5, chosen on these very samples")


def test_the_protocol_says_of_what_the_numbers_are(whole: Evaluated, networks: tuple[Transformer, Tokenizer]) -> None:
    metrics, protocol, _ = whole
    expected = {
        "split": "test",
        "n_images": N_IMAGES,
        "weights": "raw",
        "precision": "fp32",
        "samples": SAMPLES,
        "sampling": "temperature 1, no truncation, seed 5, class of sample i is i mod 10",
        "guidances": "1, 2.5",
        "tokenizer_sha256": networks[1].digest(),
    }
    assert expected.items() <= protocol.items()
    assert metrics["sample_images_per_s"] > 0
    assert protocol["sample_images_per_s"].startswith("of 230 images in batches of 25, at all guidances")


def test_without_an_unconditional_class_nothing_is_guided(
    networks: tuple[Transformer, Tokenizer], tokens: Tokens, tmp_path: Path
) -> None:
    config, runtime = CONFIG.with_fields(**{"model.class_dropout": 0.0}), dataclasses.replace(RUNTIME, samples=3)

    def evaluated(guidances: tuple[float, ...]) -> Evaluated:
        given = dataclasses.replace(runtime, guidances=guidances)
        return evaluate_transformer(config, *networks, fashion(N_IMAGES), tokens, given, tmp_path, lambda: False)

    metrics, protocol, tensors = evaluated((0.0, 1.0, 2.5))
    assert {name.partition("@")[2] for name in [*metrics, *tensors]} == {"", "1"}
    assert protocol["guidances"] == "1 at most: class_dropout=0 trains no unconditional class"
    assert [folder.name for folder in tmp_path.iterdir()] == ["guidance-1"]
    assert evaluated((1.0,))[1]["guidances"] == "1"
    assert evaluated((2.5,))[1]["distances[fashion-cnn]"] == "absent: samples=3 at 0 guidances are asked for"


def test_few_images_are_shown_of_each_of_many_classes() -> None:
    classes_N = torch.arange(260) % 25
    shown_N = module._shown(build()[1], {1.0: torch.zeros(260, T, dtype=torch.int32)}, classes_N)["shown_N"]
    assert len(shown_N) == 100
    assert classes_N[shown_N].bincount().tolist() == [10] * 10
    assert shown_N.tolist() == sorted(shown_N.tolist())


# --- What is done once ------------------------------------------------------------------------------------------------


def test_a_rerun_samples_nothing(
    evaluate: Evaluate, whole: Evaluated, tmp_path: Path, sampled: list[list[int]]
) -> None:
    first = evaluate(tmp_path)
    assert sorted(number for call in sampled for number in call) == sorted(2 * list(range(SAMPLES)))
    assert max(map(len, sampled)) == 25, "a part of 50 in two batches alike, as 40 are the most"
    sampled.clear()
    metrics, protocol, tensors = evaluate(tmp_path)
    assert sampled == []
    assert "sample_images_per_s" not in metrics
    assert protocol["sample_images_per_s"] == "absent: all samples were there from an earlier attempt"
    assert {**metrics, "sample_images_per_s": first[0]["sample_images_per_s"]} == first[0]
    for other in (first[2], whole[2]):
        assert all(torch.equal(tensors[name], other[name]) for name in tensors.keys() | other.keys())


@pytest.mark.parametrize("asked", [2, 5, 9, 15])
def test_what_was_sampled_before_a_stop_is_not_sampled_again(
    asked: int, evaluate: Evaluate, whole: Evaluated, tmp_path: Path, sampled: list[list[int]]
) -> None:
    """Four batches of the cross-entropy come first, then five of each guidance, two or one to a part."""
    with pytest.raises(
        StopRequested,
        match=r"^asked to stop while (measuring the cross-entropy|sampling at guidance|measuring samples)",
    ):
        evaluate(tmp_path, beat=stop_after(asked))
    batches = min(max(asked - 4, 0), 10)
    assert len(sampled) == batches
    in_files = {0: 0, 1: 0, 5: 5, 10: 10}[batches]
    sampled.clear()
    metrics, _, tensors = evaluate(tmp_path)
    assert len(sampled) == 10 - in_files
    assert all(torch.equal(tensors[name], whole[2][name]) for name in whole[2])
    assert {name: value for name, value in metrics.items() if name in whole[0] and name != "sample_images_per_s"} == {
        name: value for name, value in whole[0].items() if name != "sample_images_per_s"
    }


def test_samples_of_other_weights_or_seeds_are_not_taken(
    networks: tuple[Transformer, Tokenizer], images: Images, tokens: Tokens, tmp_path: Path, sampled: list[list[int]]
) -> None:
    runtime = Runtime(eval_images=10, samples=30, guidances=(2.0,))
    found = []
    for seed, nudge in ((5, 0.0), (6, 0.0), (6, 0.01), (6, 0.0)):
        with torch.no_grad():
            networks[0].head.weight[0, 0] += nudge
            arguments = (networks[0], networks[1], images, tokens, runtime, tmp_path, lambda: False)
            found.append(evaluate_transformer(CONFIG.with_fields(seed=seed), *arguments)[2]["tokens@2"])
            networks[0].head.weight[0, 0] -= nudge
    assert len(sampled) == 4
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])


def test_more_samples_take_whole_parts_along(evaluate: Evaluate, tmp_path: Path, sampled: list[list[int]]) -> None:
    for samples in (115, 100, 160):
        runtime = Runtime(eval_images=10, eval_batch_size=40, samples=samples, guidances=(1.0,))
        sampled.clear()
        evaluate(tmp_path, runtime)
        assert sum(map(len, sampled)) == {115: 115, 100: 0, 160: 60}[samples]


# --- What is absent, and what is refused ------------------------------------------------------------------------------


def without_distances(evaluated: Evaluated) -> dict[str, Any]:
    """The protocol, of metrics that have none."""
    metrics, protocol, tensors = evaluated
    assert not [name for name in metrics if "[" in name or name == "guidance"]
    assert "cross_entropy" in metrics
    assert tensors["images@1"].shape[1:] == (1, 32, 32)
    return protocol


def test_absent_metrics_say_why(
    evaluate: Evaluate, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Runtime(eval_images=N_IMAGES, samples=20, guidances=(1.0,))
    other = Images("imagefolder", "test", images.images_NCHW, images.labels_N)
    absent = without_distances(evaluate(tmp_path, few, images=other))
    assert absent["distances[efficientnet-lite0]"] == "absent: 20 images are too few, 100 are needed"
    absent = without_distances(evaluate(tmp_path, Runtime(eval_images=99, samples=20, guidances=(1.0,))))
    assert absent["distances[fashion-cnn]"] == "absent: 99 images are too few, 100 are needed"
    with monkeypatch.context() as patch:
        patch.setattr("ibq.pretrained.fashion_cnn.weights_file", lambda: tmp_path / "no file")
        absent = without_distances(evaluate(tmp_path, few))
    assert absent["distances[fashion-cnn]"].endswith("cannot be read (No such file or directory); install ibq again")

    metrics, protocol, _ = evaluate(tmp_path, few)  # few samples are enough for a share
    assert {name for name in metrics if "[" in name} == {"label_agreement[fashion-cnn]@1"}
    assert protocol["distances[fashion-cnn]"] == "absent: 20 images are too few, 100 are needed"
    assert protocol["guidance"] == "absent: there is no fid[fashion-cnn] to choose it by"


def test_what_fails_at_one_guidance_costs_that_alone(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, calls = module.Distances.compute, []

    def failing(self: Any) -> Any:
        calls.append(self)
        if len(calls) == 1:
            raise RuntimeError("out of\nmemory.")
        return compute(self)

    monkeypatch.setattr(module.Distances, "compute", failing)
    metrics, protocol, _ = evaluate(tmp_path)
    assert protocol["distances[fashion-cnn]@1"] == "absent: out of memory"
    assert {name for name in metrics if name.endswith("@1")} == set()
    assert metrics["guidance"] == 2.5
    assert metrics["recall[fashion-cnn]"] == metrics["recall[fashion-cnn]@2.5"]


def test_what_is_not_finite_is_refused(evaluate: Evaluate, tmp_path: Path) -> None:
    broken = build()
    torch.nn.init.constant_(broken[0].head.weight, math.nan)
    with pytest.raises(NonFiniteError, match=r"^the cross-entropy on the test split is nan$"):
        evaluate(tmp_path, networks=broken)


def test_guidances_are_checked_before_a_run() -> None:
    for guidances in ((1.0, -2.0), (1.0, math.inf), (2.0, 1.0, 2.0000001)):
        with pytest.raises(
            ConfigError, match=r"^guidances=\(.*\) must be finite numbers of at least 0, no two of them alike"
        ):
            Runtime(guidances=guidances)


def test_a_way_of_sharding_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^sharding='fsdp2' is not known; .*fsdp"):
        Runtime(sharding="fsdp2")  # type: ignore[arg-type]


# --- Other networks ---------------------------------------------------------------------------------------------------


def test_samples_of_a_finished_run_are_measured_with_any_network(
    whole: Evaluated,
    networks: tuple[Transformer, Tokenizer],
    images: Images,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    perceptual = PerceptualEvaluation("fashion-cnn", torch.device("cpu"))
    features, calls = distances_module.reference_features, []
    monkeypatch.setattr(
        distances_module, "reference_features", lambda *arguments: calls.append(arguments) or features(*arguments)
    )
    metrics, protocol = evaluate_samples(perceptual, networks[1], whole[2], images, N_IMAGES, 40)
    assert len(calls) == 1, "for all guidances"
    named = {name for name in whole[0] if "[fashion-cnn]" in name and "label" not in name} | {"guidance"}
    assert metrics == {name: whole[0][name] for name in named}
    assert protocol == {name: whole[1][name] for name in ("distances[fashion-cnn]", "guidance")}

    with pytest.raises(UnfitError, match="fashion-cnn is absent: 99 images are too few"):
        evaluate_samples(perceptual, networks[1], whole[2], images, 99, 40)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(DataError, match="Inception-v3"):
        evaluate_samples(
            PerceptualEvaluation("inception", torch.device("cpu")), networks[1], whole[2], images, N_IMAGES, 40
        )
