"""Command line of the method: `ibq COMMAND`, or `python -m ibq COMMAND`.

reconstruct | evaluate | sample | data | check
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ibq.cli.boundary import one_sentence_errors

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Image tokenizers with index backpropagation quantization and its rivals.",
)

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="folder of a finished run or of Tokenizer.save, or a released .ckpt")
]
PicturesArgument = Annotated[
    str, typer.Argument(metavar="PICTURES", help="folder of pictures, of any sizes, with subfolders or without")
]
FitOption = Annotated[
    Literal["whole", "crop"] | None,
    typer.Option(
        help="of a picture whose size the tokenizer does not divide: skip it (whole, the default), or take the "
        "largest centre part (crop)"
    ),
]
ResizeOption = Annotated[
    int | None,
    typer.Option(min=1, help="scale the shorter side to this, take the centre square; enlarges nothing"),
]
ScalingOption = Annotated[
    Literal["antialiased", "released"] | None,
    typer.Option(
        help="how --resize scales: antialiased bicubic, upright as EXIF says, or bilinear without antialiasing and not "
        "turned, as the released code; default: as in the tokenizer's training"
    ),
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="only the first files of the sorted listing")]
BatchOption = Annotated[int, typer.Option(min=1, help="pictures at a time; fewer above 256×256 pixels")]
WeightsOption = Annotated[Literal["ema", "raw"], typer.Option(help="of a released checkpoint: averaged, or as trained")]
DeviceOption = Annotated[
    str, typer.Option(help="auto, cpu, cuda or cuda:N; under torchrun each process has a GPU of its own")
]


@app.callback()
def _app() -> None:
    """Image tokenizers with index backpropagation quantization and its rivals."""


@app.command()
@one_sentence_errors
def reconstruct(
    model: ModelArgument,
    pictures: PicturesArgument,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="folder for what is written; again: only what is missing is done"),
    ],
    fit: FitOption = None,
    resize: ResizeOption = None,
    scaling: ScalingOption = None,
    limit: LimitOption = None,
    batch_size: BatchOption = 16,
    weights: WeightsOption = "ema",
    device: DeviceOption = "auto",
) -> None:
    """Reconstruct a folder of pictures: OUT gets PNG files, the indices, and a page that shows both."""
    from ibq.cli.common import PictureOptions
    from ibq.cli.reconstruct import reconstruct

    reconstruct(PictureOptions(model, pictures, fit, resize, scaling, limit, batch_size, weights, device), out)


@app.command()
@one_sentence_errors
def evaluate(
    model: ModelArgument,
    pictures: Annotated[
        str | None,
        typer.Argument(metavar="[PICTURES]", help="folder of pictures, of any sizes, with subfolders or without"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="in place of PICTURES: the test split of fashion-mnist, landscapes or photos, whatever the tokenizer "
            "was trained on",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="a metric that needs a network, repeatable: inception, lpips-alex, lpips-vgg, efficientnet-lite0, "
            "perceptual-efficientnet-lite0, fashion-cnn (for pictures of Fashion-MNIST) or none; without the option: "
            "all but fashion-cnn"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="also write all of it as JSON")] = None,
    fit: FitOption = None,
    resize: ResizeOption = None,
    scaling: ScalingOption = None,
    limit: LimitOption = None,
    batch_size: BatchOption = 16,
    weights: WeightsOption = "ema",
    device: DeviceOption = "auto",
) -> None:
    """Print usage, rate, distortion and, where their networks' weights are, FID and LPIPS of a tokenizer on a folder of
    pictures or another data set."""
    from ibq.cli.common import PictureOptions
    from ibq.cli.evaluate import evaluate

    options = PictureOptions(model, pictures, fit, resize, scaling, limit, batch_size, weights, device, data)
    evaluate(options, tuple(metric or ()), out)


@app.command()
@one_sentence_errors
def sample(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="folder of a transformer's finished run, or a transformer's released checkpoint"
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="folder for what is written; again: only what is missing is made"),
    ],
    classes: Annotated[str | None, typer.Option(help="such as 0,3,5-7; default: all")] = None,
    count: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="samples in all, given to the classes in turn; a greater number adds to a folder; default: 8 a "
            "class, at most 80",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="of the random numbers")] = 0,
    npz: Annotated[bool, typer.Option("--npz", help="also write samples.npz, as the ADM evaluator reads it")] = False,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="only the K most probable; default: all")] = None,
    top_p: Annotated[float, typer.Option(help="only the fewest that have probability P")] = 1.0,
    min_p: Annotated[float, typer.Option(help="only those P times as probable as the first")] = 0.0,
    guidance: Annotated[float, typer.Option(help="scale of classifier-free guidance; 1 is none")] = 1.0,
    guidance_schedule: Annotated[
        Literal["constant", "linear", "cosine", "interval"], typer.Option(help="of the scale over the tokens")
    ] = "constant",
    guidance_power: Annotated[float, typer.Option(help="of the cosine: the larger, the later it rises")] = 1.0,
    guidance_start: Annotated[float, typer.Option(help="of the interval, a share of the tokens")] = 0.0,
    guidance_end: Annotated[float, typer.Option(help="of the interval")] = 1.0,
    tokenizer: Annotated[
        str | None, typer.Option(help="the tokenizer's folder, of a run's folder that was copied without it")
    ] = None,
    weights: WeightsOption = "ema",
    batch_size: Annotated[int, typer.Option(min=1, help="samples drawn together")] = 32,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="of the transformer")] = "fp32",
    depth: Annotated[
        Literal["rounded", "cut"] | None,
        typer.Option(
            "--bytes",
            help="how images become bytes; default: rounded, or cut, as released, of a tokenizer that was trained on "
            "pictures scaled as released",
        ),
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile: pays where many are drawn")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Draw images from a transformer: OUT gets a PNG file of each, a grid (grid.png) and what they were made with
    (samples.json)."""
    options = dict(locals())
    from ibq.cli.sample import Options, sample

    sample(Options(**options))


@app.command()
@one_sentence_errors
def data(
    name: Annotated[str, typer.Argument(metavar="NAME", help="fashion-mnist, landscapes, photos or imagefolder:PATH")],
    resolution: Annotated[int, typer.Option(help="pixels a side")] = 32,
) -> None:
    """Fetch a data set where need be and print of each split: number, shape, content hash, source, files skipped."""
    from ibq.cli.data import describe

    describe(name, resolution)


@app.command()
@one_sentence_errors
def check(
    quantizers: Annotated[
        list[str],
        typer.Argument(metavar="QUANTIZER...", help="file of one's own (FILE.py), or the name of a method"),
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="field=value of the quantizer's config, e.g. code_dim=8; repeatable"),
    ] = None,
) -> None:
    """Try quantizers by every rule of their contract, and say in words what breaks it; exit code 1 if anything does."""
    from ibq.cli.check import check

    if not check(quantizers, set_):
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the command `ibq`."""
    app(prog_name="ibq")
