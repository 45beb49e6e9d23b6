"""`ibq reconstruct MODEL PICTURES OUT`: pictures through a tokenizer and back, with a page that shows
both side by side.

OUT/originals/NAME.png           the picture as the tokenizer was shown it
OUT/reconstructions/NAME.png     what it made of it; NAME is the picture's path below PICTURES, ending included
OUT/differences/NAME.png         the greatest difference of the channels, times AMPLIFICATION
OUT/indices/NAME.safetensors     `indices_BHW` (1, h, w) int64: `tokenizer.decode` of it gives the reconstruction
OUT/pictures.jsonl               a line per finished picture; a rerun does only what has none, or whose picture, model
                                 or framing changed
OUT/index.html, index-2.html     the pages, written last

Suffixes: B pictures, C channels, H W pixels or token grid, K codes.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensors_as_bytes

from ibq.cli.common import (
    Batch,
    Model,
    PictureOptions,
    closing_line,
    open_model,
    progress,
    reconstructed,
)
from ibq.cli.pictures import PictureFolder, png
from ibq.data.images import quoted
from ibq.errors import ConfigError, require_packages
from ibq.evaluation.pictures import PIXEL_PROTOCOL
from ibq.metrics.dimension import effective_dimension, used_codes
from ibq.metrics.distances import to_uint8
from ibq.metrics.quality import pixel_errors
from ibq.metrics.usage import counts_of, uncountable, usage_metrics
from ibq.run_directory import append_line, read_lines, write_bytes, write_text

if TYPE_CHECKING:
    from jinja2 import Environment

AMPLIFICATION = 4
PICTURES_A_PAGE = 100
LONGEST_PART = 200
"""Bytes that a file's name may have before it is replaced by its hash: endings and temporary names must fit beside
it."""
KINDS = ("originals", "reconstructions", "differences")
RECORDS = "pictures.jsonl"

Record = dict[str, Any]


class Output:
    """The folder OUT: where each picture's files lie, and which are finished.

    Args:
        path: made if absent.
        pictures: what is reconstructed; OUT must not lie among them.
        model: whose reconstructions these are.

    Raises:
        ConfigError: the folder lies inside that of the pictures, or holds other files.
    """

    def __init__(self, path: Path, pictures: PictureFolder, model: Model) -> None:
        self.path, self._pictures = path, pictures
        if path.resolve().is_relative_to(pictures.path.resolve()):
            raise ConfigError(
                f"{quoted(path)} lies inside {quoted(pictures.path)}, where reconstructions would be taken for "
                f"originals; choose an OUT "
                "outside"
            )
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{quoted(path)} is a file; choose a folder for OUT")
        if (
            path.is_dir()
            and not (path / RECORDS).is_file()
            and any(not name.startswith(".") for name in os.listdir(path))
        ):
            raise ConfigError(
                f"{quoted(path)} holds other files than reconstructions; choose an empty or a new folder for OUT"
            )
        path.mkdir(parents=True, exist_ok=True)
        (path / RECORDS).touch()
        self.records: dict[str, Record] = {record["name"]: record for record in read_lines(path / RECORDS)}
        self._keys: dict[str, str] = {}
        self._made_by = f"{model.digest} {pictures.framing} f={pictures.framing.factor} x{AMPLIFICATION}"

    def file(self, kind: str, name: str) -> Path:
        """A picture's file of one of KINDS or of "indices"."""
        return self.path / kind / (_short(name) + (".safetensors" if kind == "indices" else ".png"))

    def unfinished(self, skip: list[str]) -> Iterator[str]:
        """Names of the pictures that are still to be done, found as the work gets on; the others are appended to
        `skip`."""
        for name in self._pictures.names:
            record, key = self.records.get(name), self._content_key(name)
            if record and record["key"] == key and all(self.file(kind, name).is_file() for kind in (*KINDS, "indices")):
                skip.append(name)
            else:
                self.records.pop(name, None)
                self._keys[name] = key
                yield name

    def write(self, batch: Batch) -> None:
        """The files of a batch, and last the line of each of its pictures."""
        errors = pixel_errors(batch.originals_BCHW, batch.output.images)
        reconstructions_BCHW = to_uint8(batch.output.images).cpu()
        indices_BHW = batch.output.quantized.indices.cpu()
        for i, picture in enumerate(batch.pictures):
            x_CHW, y_CHW, indices_HW = picture.pixels_CHW, reconstructions_BCHW[i], indices_BHW[i]
            difference_HW = (x_CHW.int() - y_CHW.int()).abs().amax(0).mul(AMPLIFICATION).clamp(max=255).to(torch.uint8)
            for kind, pixels_CHW in zip(KINDS, (x_CHW, y_CHW, difference_HW[None]), strict=True):
                write_bytes(self.file(kind, picture.name), png(pixels_CHW))
            write_bytes(
                self.file("indices", picture.name), tensors_as_bytes({"indices_BHW": indices_HW[None].contiguous()})
            )
            record = {
                "name": picture.name,
                "key": self._keys.pop(picture.name),
                "width": x_CHW.shape[2],
                "height": x_CHW.shape[1],
                "psnr_db": float(errors["psnr_db"][i]),
                "l1": float(errors["l1"][i]),
                "tokens": indices_HW.numel(),
                "codes_used": len(indices_HW.unique()),
            }
            append_line(self.path / RECORDS, record)
            self.records[picture.name] = record

    def shown(self) -> list[Record]:
        """The records of the pictures that are finished, in the order of the files."""
        return [self.records[name] for name in self._pictures.names if name in self.records]

    def counts(self, codebook_size: int) -> torch.Tensor:
        """Counts (K,) of the codes in all indices together, as `counts_of`."""
        counts_K = counts_of(torch.zeros(0, dtype=torch.int64), codebook_size)
        for record in self.shown():
            path = self.file("indices", record["name"])
            try:
                counts_K += counts_of(load_tensors(path.read_bytes())["indices_BHW"], codebook_size)
            except (SafetensorError, KeyError):
                raise ConfigError(f"{quoted(path)} is damaged; delete it and run the command again") from None
        return counts_K

    def _content_key(self, name: str) -> str:
        """Hash of a picture's bytes, model and framing; of a picture that cannot be read, the empty text."""
        path = self._pictures.path / name
        digest = hashlib.sha256(self._made_by.encode())
        try:
            if path.is_file():  # and no pipe, which would keep us waiting
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError:
            return ""
        return digest.hexdigest()


def _short(name: str) -> str:
    """A relative path, parts too long to be given an ending replaced by their hash."""
    parts = [
        hashlib.sha256(part_bytes).hexdigest() if len(part_bytes := os.fsencode(part)) > LONGEST_PART else part
        for part in name.split(os.sep)
    ]
    return os.path.join(*parts)


# --- Pages ------------------------------------------------------------------------------------------------------------


def write_pages(output: Output, model: Model, pictures: PictureFolder) -> Path:
    """Write the pages of all finished pictures, PICTURES_A_PAGE each, and remove pages of earlier runs beyond; returns
    the first's path."""
    records, K = output.shown(), model.tokenizer.config.quantizer.codebook_size
    facts = model.facts(str(pictures.framing)) | _totals(records, output.counts(K), model)
    pages = [records[start : start + PICTURES_A_PAGE] for start in range(0, len(records), PICTURES_A_PAGE)]
    names = [_page_name(number) for number in range(len(pages))]
    template = _environment().get_template("reconstructions.html")
    for number, shown in enumerate(pages):
        text = template.render(
            facts=facts,
            pictures=[_as_shown(output, record) for record in shown],
            pages=names,
            current=number,
            first=number * PICTURES_A_PAGE + 1,
            total=len(records),
            a_page=PICTURES_A_PAGE,
            amplification=AMPLIFICATION,
            white=math.ceil(255 / AMPLIFICATION),
            codebook_size=K,
            pixel_protocol=PIXEL_PROTOCOL,
            skipped=pictures.skipped,
        )
        write_text(output.path / names[number], text)
    for stale in output.path.glob("index-*.html"):
        if stale.name not in names:
            stale.unlink()
    return output.path / names[0]


def _page_name(number: int) -> str:
    return "index.html" if number == 0 else f"index-{number + 1}.html"


def _totals(records: list[Record], counts_K: torch.Tensor, model: Model) -> dict[str, str]:
    n, tokens = len(records), sum(record["tokens"] for record in records)
    pixels = sum(record["width"] * record["height"] for record in records)
    psnr, l1 = (math.fsum(record[name] for record in records) / n for name in ("psnr_db", "l1"))
    return {
        "pictures": f"{n:,}, {pixels:,} pixels, {tokens:,} tokens",
        "PSNR": f"{psnr:.2f} dB, mean over pictures; {PIXEL_PROTOCOL}",
        "L1": f"{l1:.4f}, mean over pictures; the same",
        "codes": _codes(counts_K, model),
    }


@torch.no_grad()
def _codes(counts_K: torch.Tensor, model: Model) -> str:
    """Usage of all pictures, and how many dimensions the codes in use span."""
    quantizer = model.tokenizer.quantize
    K, D = quantizer.config.codebook_size, quantizer.config.code_dim
    if reason := uncountable(K):
        return reason
    usage, used = usage_metrics(counts_K), effective_dimension(used_codes(quantizer.codebook.cpu(), counts_K.cpu()))
    return (
        f"{usage['usage']:.1%} used, perplexity {usage['perplexity']:,.1f}; as many uniform tokens would use "
        f"{usage['uniform_usage']:.1%}" + (f"; effective dimension {used[0]:.1f} of {D}" if used else "")
    )


def _as_shown(output: Output, record: Record) -> Record:
    """A record with what a page needs besides: its name without unprintable signs, and the addresses of its files."""

    def address(kind: str) -> str:
        return quote(os.fsencode(PurePosixPath(output.file(kind, record["name"]).relative_to(output.path))))

    return (
        record
        | {"label": quoted(record["name"]), "small": record["width"] < 200}
        | {kind: address(kind) for kind in (*KINDS, "indices")}
    )


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    folder = Path(__file__).parent
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


# --- The command ------------------------------------------------------------------------------------------------------


def reconstruct(given: PictureOptions, out: Path) -> None:
    """Reconstruct the pictures that have no files in the folder `out` yet, and write its page.

    Raises:
        ConfigError, DataError: an argument cannot be used, or the model gives numbers that are not finite.
    """
    require_packages("jinja2")
    model, pictures = open_model(given)
    output = Output(out.expanduser().absolute(), pictures, model)
    device = next(model.tokenizer.parameters()).device
    already: list[str] = []
    with progress(len(pictures.names)) as bar:
        done = 0
        for batch in reconstructed(model, pictures, output.unfinished(already), given.batch_size):
            output.write(batch)
            done += len(batch.pictures)
            bar.update(done + len(already) - bar.n)
        bar.update(bar.total - bar.n)
    pictures.require_used(done + len(already))
    page = write_pages(output, model, pictures)
    unchanged = f" ({len(already):,} were finished and are unchanged)" if already else ""
    print(f"{closing_line(pictures, done + len(already), device)}{unchanged}", file=sys.stderr)
    print(page)
