"""The command that measures: bench."""

from __future__ import annotations

from typing import Annotated

import typer

from experiments.cli.base import DeviceOption, app, say
from ibq.cli.boundary import one_sentence_errors
from ibq.errors import ConfigError, nearest

BENCHMARKS = {
    "index-backprop": ("--tokens", "--codes", "--dim", "--dtype"),
    "tokenizer-training": ("--codes", "--method", "--batch", "--accumulate", "--dtype", "--small"),
    "overfit": ("--small",),
    "sampling": ("--batch", "--small"),
    "quantizer-step": ("--codes", "--small"),
}
"""The options that each benchmark has beside --device and --publish."""


@app.command()
@one_sentence_errors
def bench(
    name: Annotated[str, typer.Argument(help=", ".join(BENCHMARKS))],
    device: DeviceOption = "auto",
    tokens: Annotated[str, typer.Option(help="N, e.g. 1024,4096; default: a grid for the device")] = "",
    codes: Annotated[str, typer.Option(help="K, likewise")] = "",
    dim: Annotated[int | None, typer.Option(help="D; default: 256")] = None,
    batch: Annotated[
        int | None, typer.Option(help="images a step, default: 32; or sampled together, default: 16, on CUDA 64")
    ] = None,
    method: Annotated[str, typer.Option(help="ibq, vq or lfq; default: ibq")] = "",
    accumulate: Annotated[
        int | None, typer.Option(help="micro-batches of a step; default: 8, as the recipes have it")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or, in training, float16; default: bfloat16 on CUDA")
    ] = "",
    small: Annotated[bool, typer.Option("--small", help="a tiny network, to try the benchmark itself")] = False,
    publish: Annotated[bool, typer.Option(help="also copy it to reports/published/, to be committed")] = False,
) -> None:
    """Measure: an operator against its rivals, training at the paper's size, whether the objective can overfit,
    sampling, or the step of every quantizer."""
    from experiments.benchmarks import index_backprop, overfit, quantizer_step, sampling, tokenizer_training
    from experiments.report import tables

    given = {"--tokens": tokens, "--codes": codes, "--dim": dim, "--batch": batch, "--dtype": dtype, "--small": small}
    given |= {"--method": method, "--accumulate": accumulate}
    if name not in BENCHMARKS:
        raise ConfigError(f"benchmark {name!r} does not exist; {nearest(name, BENCHMARKS)}")
    if idle := [option for option, value in given.items() if value and option not in BENCHMARKS[name]]:
        raise ConfigError(f"benchmark {name} has no {idle[0]}; it has {', '.join(BENCHMARKS[name])}")
    if name == "index-backprop":
        rows = index_backprop.run(device, _sizes(tokens), _sizes(codes), 256 if dim is None else dim, dtype, say)
        table, folder = index_backprop.table(rows), index_backprop.write(rows, publish)
    elif name == "tokenizer-training":
        images, parts = (default if value is None else value for value, default in ((batch, 32), (accumulate, 8)))
        rows = tokenizer_training.run(device, _sizes(codes), images, dtype, method or "ibq", parts, small, say)
        table, folder = tokenizer_training.table(rows), tokenizer_training.write(rows, publish)
    elif name == "sampling":
        rows = sampling.run(device, batch, small, say)
        table, folder = sampling.table(rows), sampling.write(rows, publish)
    elif name == "quantizer-step":
        rows = quantizer_step.run(device, _sizes(codes), small, say)
        table, folder = quantizer_step.table(rows), quantizer_step.write(rows, publish)
    else:
        rows = overfit.run(device, small, say)
        table, folder = overfit.table(rows), overfit.write(rows, publish)
    print(tables.markdown(table))
    print(f"report: {folder}")


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"sizes {text!r} are not whole numbers separated by commas, e.g. 1024,4096") from None
