"""Rows of transformers beyond their columns: the guidances that they were evaluated at, and findings in
words."""

from __future__ import annotations

import math
import re

import pandas as pd

from experiments.ablations import Ablation
from ibq.metrics import METRICS

FID, AGREEMENT = METRICS["fid"].column, METRICS["label_agreement"].column
TOKENIZER_L1 = METRICS["tokenizer_l1"].column


def guidances(rows: pd.DataFrame) -> list[float]:
    """Guidances that rows have a FID at, ascending."""
    found = [re.fullmatch(re.escape(FID) + "@(.+)", column) for column in rows]
    return sorted(float(match[1]) for match in found if match and rows[match[0]].notna().any())


def _means(ablation: Ablation, done: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Columns of finished rows, their mean over seeds, by arm in the ablation's order."""
    by_arm = done.reindex(columns=["arm", *columns]).groupby("arm")[list(columns)].mean()
    return by_arm.reindex([arm.name for arm in ablation.arms if arm.name in by_arm.index])


def without_result(ablation: Ablation, rows: pd.DataFrame) -> list[str]:
    """The arms that have no result, each with its letter and why, e.g. "C lfq_tokens (nan)"."""
    states = {arm.name: set(rows[rows["arm"] == arm.name]["status"]) for arm in ablation.arms}
    return [
        f"{ablation.letter(arm)} {arm} ({'/'.join(sorted(of)) or 'not trained'})"
        for arm, of in states.items()
        if "ok" not in of
    ]


def sentences(ablation: Ablation, rows: pd.DataFrame) -> list[str]:
    """The best guidances, how often samples are what was asked for, what bits say of quality, and what depth does."""
    if ablation.transformer is None:
        return []
    done = rows[rows["status"] == "ok"]
    known = _means(ablation, done, FID, AGREEMENT, "bits_per_image", TOKENIZER_L1, "parameters").dropna(
        subset=[FID, "bits_per_image"]
    )
    if known.empty:
        return []
    said = [_of_guidance(done.dropna(subset=["guidance", FID]), known[FID], guidances(done))]
    if known[AGREEMENT].notna().any():
        said.append(_of_agreement(known[AGREEMENT].dropna()))
    return [*said, *_of_bits(known), *_of_depth(ablation, known)]


def _of_guidance(done: pd.DataFrame, fids: pd.Series, tried: list[float]) -> str:
    best = fids.idxmin()
    at = "; ".join(f"{guidance:g} for {_arms(mine)}" for guidance, mine in done.groupby("guidance"))
    ends = done[done["guidance"] == max(tried)]  # below the least, 1, there is no guidance
    beyond = (
        f" At the largest that was tried, so perhaps not the best: {_arms(ends)}."
        if len(ends) and len(tried) > 1
        else ""
    )
    return (
        f"FID[fashion-cnn] is lowest at guidance {at}; it was chosen on the very samples that it is of.{beyond} "
        f"The lowest of all is {fids[best]:.2f}, of {best}."
    )


def _arms(rows: pd.DataFrame) -> str:
    return ", ".join(map(str, rows["arm"].unique()))


def _of_agreement(agreement: pd.Series) -> str:
    most, least = agreement.idxmax(), agreement.idxmin()
    sentence = (
        f"fashion-cnn sees the class that was asked for in {100 * agreement[most]:.1f}% of the samples of "
        f"{most} at its best guidance"
    )
    return sentence + (
        f", the most, and in {100 * agreement[least]:.1f}% of those of {least}, the least." if most != least else "."
    )


def _of_bits(known: pd.DataFrame) -> list[str]:
    """Bits against quality: is the arm with the fewest bits the one with the best samples?"""
    if len(known) < 2:
        return []
    fewest, best = known["bits_per_image"].idxmin(), known[FID].idxmin()
    bits, fids = known["bits_per_image"], known[FID]
    if fewest == best:
        return [
            f"Here the fewest bits per image ({bits[best]:.0f}) and the lowest FID[fashion-cnn] are of one arm, {best}."
        ]
    distortion = known[TOKENIZER_L1]
    behind = f", behind a tokenizer of L1 {distortion[fewest]:.3f}" if math.isfinite(distortion[fewest]) else ""
    return [
        f"Bits alone compare nothing: {fewest} has the fewest an image ({bits[fewest]:.0f}{behind}) at an "
        f"FID[fashion-cnn] of {fids[fewest]:.2f}; {best}, with the lowest, has {bits[best]:.0f} bits."
    ]


def _of_depth(ablation: Ablation, known: pd.DataFrame) -> list[str]:
    """From the smallest to the largest transformer of each set of arms that differ in depth alone."""
    said = []
    for arms in ablation.sizes():
        mine = known.loc[[arm.name for arm in arms if arm.name in known.index]].sort_values("parameters")
        if mine["parameters"].nunique() > 1:
            small, large = mine.iloc[0], mine.iloc[-1]
            said.append(
                f"From {small.name} to {large.name} parameters go from {small['parameters'] / 1e6:.2f} to "
                f"{large['parameters'] / 1e6:.2f} million, bits per image from {small['bits_per_image']:.1f} to "
                f"{large['bits_per_image']:.1f}, FID[fashion-cnn] from {small[FID]:.2f} to {large[FID]:.2f}."
            )
    return said
