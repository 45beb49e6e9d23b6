"""The command under torchrun, in real processes: killed, asked to stop, given something wrong; the same command goes on and ends the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experiments.study import ROOT
from ibq.run_directory import RunDirectory

STEPS = 40
FIELDS = {
    "data.name": "fashion-mnist",
    "data.crop": "center",
    "data.resolution": 32,
    "model.base_channels": 4,
    "model.norm_groups": 2,
    "model.res_blocks": 1,
    "model.z_channels": 8,
    "model.attention_resolutions": [],
    "loss.perceptual": "none",
    "loss.adversarial.channels": 8,
    "loss.adversarial.layers": 2,
    "loss.adversarial.norm": "group",
    "quantizer.codebook_size": 16,
    "quantizer.code_dim": 8,
    "averages": "global",
    "batch_size": 8,
    "accumulate": 2,
    "precision": "fp32",
    "steps": STEPS,
    "optim.lr": 1e-4,
}
