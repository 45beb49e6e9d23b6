"""Modules and images that all trainers share. A server that forks them imports this module, so that each begins with
it: the libraries that a run needs, among them those that wait for its evaluation, and the images of Fashion-MNIST where
they are here."""

from __future__ import annotations

from contextlib import suppress
from typing import get_args

import torchmetrics.functional.image  # noqa: F401

import experiments.runner.worker  # noqa: F401
import ibq.pretrained.extractors  # noqa: F401
from ibq.config import DataConfig
from ibq.data import Split, load_images
from ibq.data.fashion_mnist import FILES
from ibq.errors import DataError

if FILES.are_here():
    with suppress(DataError):  # a run that wants it says so
        for split in get_args(Split):
            load_images(DataConfig(), split)
