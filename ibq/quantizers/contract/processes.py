"""Rule on several processes: two under DistributedDataParallel train what one trains on the joined batch."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from ibq.losses import weighted_sum
from ibq.quantizers.base import Quantized
from ibq.quantizers.build import build_quantizer
from ibq.quantizers.contract.state import is_random
from ibq.quantizers.contract.trial import listed, seeded, unequal
from ibq.schema import QuantizerConfig

WORLD, STEPS, BATCH, CHANNELS = 2, 3, 4, 5
DEMAND = "two processes hold the same, and train what one does on the joined batch"
GRADIENTS, STATE, ATOL = 1e-8, 1e-9, 1e-11
"""Shares of the value, and what is added to them, within which two processes have what one has, in float64."""
GRADIENT_OF = "the gradient of"
TIMEOUT = timedelta(seconds=60)
"""Of a collective: one process may have come to it and the other not."""


class Toy(nn.Module):
    """An encoder, a quantizer and a decoder, in float64; what is initialised from features sees other ones on each
    process, of which those of the first count."""

    def __init__(self, config: QuantizerConfig, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.quantizer = build_quantizer(config)
        if self.quantizer.awaits_features:
            of_rank = torch.Generator().manual_seed(rank)
            features_MD = torch.randn(self.quantizer.features_wanted, config.code_dim, generator=of_rank)
            self.quantizer.initialize_from(features_MD, torch.Generator().manual_seed(0))
        self.encoder = nn.Conv2d(CHANNELS, config.code_dim, 1)
        self.decoder = nn.Conv2d(config.code_dim, CHANNELS, 1)
        self.double()

    def forward(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, Quantized]:
        quantized = self.quantizer(self.encoder(x_BCHW))
        return self.decoder(quantized.z_q), quantized


def train(toy: Toy, forward: Callable[..., Any], part: slice, rank: int) -> dict[str, torch.Tensor]:
    """Gradients of the last of some steps on part of every batch, and the state after one more forward, which applies
    what the last step has left."""
    optimizer = torch.optim.SGD([parameter for parameter in toy.parameters() if parameter.requires_grad], lr=0.1)
    for step in range(STEPS + 1):
        of_step = torch.Generator().manual_seed(step)
        x_BCHW = torch.randn(BATCH, CHANNELS, 3, 3, dtype=torch.float64, generator=of_step)[part]
        torch.manual_seed(10 * step + rank)  # what is drawn is drawn on each process by itself
        y_BCHW, quantized = forward(x_BCHW)
        if step == STEPS:
            break
        loss = (y_BCHW - x_BCHW).square().mean() + weighted_sum(quantized.losses, toy.quantizer.config.loss_weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gradients = {f"{GRADIENT_OF} {name}": p.grad for name, p in toy.named_parameters() if p.grad is not None}
    return gradients | {name: tensor.clone() for name, tensor in toy.state_dict().items()}


def _train_one_of_two(rank: int, folder: str, configs: Sequence[QuantizerConfig], first: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # of torch: broadcast_buffers, and collectives with a gradient
    store = f"file://{folder}/rendezvous-{first}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=TIMEOUT)
    half = BATCH // WORLD
    for number, config in enumerate(configs[first:], first):
        try:
            toy = Toy(config, rank)
            toy.quantizer.group = dist.group.WORLD
            forward = DistributedDataParallel(toy, broadcast_buffers=False)
            result: Any = train(toy, forward, slice(half * rank, half * (rank + 1)), rank)
        except Exception as error:
            result = f"{type(error).__name__}: {' '.join(str(error).split())}"
        torch.save(result, Path(folder) / f"{number}-{rank}.pt")
        if isinstance(result, str):  # the other process waits in vain, and is not waited for
            break
    else:
        dist.destroy_process_group()


def two_processes(configs: Sequence[QuantizerConfig]) -> list[list[str]]:
    """Sentences on what breaks in two processes, of each config; starts two processes for all of them, and two more
    after each that fails."""
    said: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        while len(said) < len(configs):
            first = len(said)
            arguments = (folder, configs, first)
            spawn(_train_one_of_two, args=arguments, nprocs=WORLD)
            for number in range(first, len(configs)):
                files = [Path(folder) / f"{number}-{rank}.pt" for rank in range(WORLD)]
                results = [torch.load(file) for file in files if file.is_file()]
                said.append(list(_judge(configs[number], results)))
                if any(isinstance(result, str) for result in results):
                    break
    return said


def _judge(config: QuantizerConfig, results: list[Any]) -> Iterator[str]:
    if failed := [result for result in results if isinstance(result, str)]:
        yield f"in two processes it raises {failed[0]}"
        return
    one, other = results
    if differing := unequal(one, other):
        yield (
            f"two processes that average their gradients differ in {listed(differing)}; add up what is counted over "
            f"ranks (ibq.distributed.sum_over_ranks), and take what is drawn from the first (copy_from_first)"
        )
        return
    with seeded(0):
        if is_random(config):  # one process and two necessarily draw something else
            return
        toy = Toy(config, rank=0)
        expected = train(toy, toy, slice(None), rank=0)
    apart = {name: (one[name].double() - of.double()).abs() for name, of in expected.items()}
    within = {
        name: ATOL + (GRADIENTS if name.startswith(GRADIENT_OF) else STATE) * of.double().abs()
        for name, of in expected.items()
    }
    beyond = [name for name in expected if bool((apart[name] > within[name]).any())]
    if beyond:
        largest = max(float(apart[name].max()) for name in beyond)
        yield (
            f"two processes do not train what one does on the joined batch: {listed(beyond)} differs by up to "
            f"{largest:.2g} (allowed: {STATE:g} of the value, of a gradient {GRADIENTS:g}); take means and sums over a "
            f"batch over the group, training_group"
        )
