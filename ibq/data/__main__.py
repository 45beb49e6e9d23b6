"""`python -m ibq.data NAME`: fetch a data set where need be, and say what it is."""

from __future__ import annotations

import argparse
import sys
from typing import get_args

import torch
from pydantic import ValidationError

from ibq.config import DataConfig
from ibq.data import FASHION_MNIST_RESOLUTION, DataError, Split, load_images
from ibq.errors import one_sentence


def main(arguments: list[str] | None = None) -> None:
    """Fetch a data set where need be and print, for each split: number, shape, content hash, source; of a folder also
    how many it skips."""
    parser = argparse.ArgumentParser(prog="python -m ibq.data", description=main.__doc__)
    parser.add_argument(
        "name", nargs="?", default="fashion-mnist", help="fashion-mnist, photos or imagefolder:PATH (%(default)s)"
    )
    parser.add_argument("--resolution", type=int, default=FASHION_MNIST_RESOLUTION, help="pixels a side (%(default)s)")
    given = parser.parse_args(arguments)
    try:
        config = DataConfig(name=given.name, resolution=given.resolution)
        for split in get_args(Split):
            images = load_images(config, split)
            shape = "x".join(str(size) for size in images.pixels(torch.zeros(1, dtype=torch.int64)).shape[1:])
            facts = [f"{len(images):,} images of {shape}", f"hash {images.content_hash[:12]}", f"from {images.source}"]
            if config.kind == "imagefolder":
                facts.append(f"{len(images.skipped):,} skipped")
            print(f"{images.name} {split}: {', '.join(facts)}")
    except ValidationError as error:
        sys.exit(f"ibq.data: {one_sentence(error)}")
    except DataError as error:
        sys.exit(f"ibq.data: {error}")


if __name__ == "__main__":
    main()
