"""Ablations of the smoke study that tests share."""

from experiments.ablations import ABLATIONS

AT_SMOKE = {name: ablation for name, ablation in ABLATIONS.items() if name != "evidence"}
"""All but the one whose data is fetched, and which has the methods of others."""
