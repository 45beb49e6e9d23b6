"""The command that measures: bench."""

from __future__ import annotations

from typing import Annotated

import typer

from experiments import tables
from experiments.cli.base import DeviceOption, app, one_sentence_errors, say
from ibq.errors import ConfigError, nearest


@app.command()
@one_sentence_errors
def bench(
    name: Annotated[str, typer.Argument(help="index-backprop")],
    device: DeviceOption = "auto",
    tokens: Annotated[str, typer.Option(help="N, e.g. 1024,4096; default: a grid for the device")] = "",
    codes: Annotated[str, typer.Option(help="K, likewise")] = "",
    dim: Annotated[int, typer.Option(help="D")] = 256,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16; default: bfloat16 on CUDA")] = "",
    publish: Annotated[bool, typer.Option(help="also copy it to reports/published/, to be committed")] = False,
) -> None:
    """Measure an operator against its rivals: time, memory, operations a second."""
    from experiments.benchmarks import index_backprop

    if name != "index-backprop":
        raise ConfigError(f"benchmark {name!r} does not exist; {nearest(name, ['index-backprop'])}")
    rows = index_backprop.run(device, _sizes(tokens), _sizes(codes), dim, dtype, say)
    print(tables.markdown(index_backprop.table(rows)))
    print(f"report: {index_backprop.write(rows, publish)}")


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"sizes {text!r} are not whole numbers separated by commas, e.g. 1024,4096") from None
