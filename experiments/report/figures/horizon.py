"""Effects against the length of training: does a claim's answer change with more steps?"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.ablations import Ablation
from experiments.analysis.verdicts import MIN_SEEDS, Verdict, interval, verdicts
from experiments.report.figures.theme import LINE_COLORS, MARKERS, axis_label, panel_grid
from experiments.study import Study

STEPS, SETTING = "steps", "setting"
"""Factors of the ablations that have this figure."""


def effect_over_steps(study: Study, ablation: Ablation, rows: pd.DataFrame) -> Figure | None:
    """A panel a claim: mean paired difference and its 95% interval against steps, a line a setting, the claimed change
    dashed; a circle without an interval where seeds are too few."""
    panels: dict[tuple[str, ...], list[Verdict]] = {}
    for judged in verdicts(ablation, rows):
        if judged.differences:
            panels.setdefault(_question(ablation, judged), []).append(judged)
    if not panels:
        return None
    settings = ablation.factor(SETTING).levels
    apart = {setting: 1.05 ** (i - (len(settings) - 1) / 2) for i, setting in enumerate(settings)}
    figure, axes = panel_grid(len(panels), 2, 3.3)
    for axis, (question, claims) in zip(axes, panels.items(), strict=True):
        for i, setting in enumerate(settings):
            mine = [claim for claim in claims if _level(ablation, claim, SETTING) == setting]
            at = [_steps(rows, claim) * apart[setting] for claim in mine]
            means = [float(np.mean(claim.differences)) for claim in mine]
            known = [len(claim.differences) >= MIN_SEEDS for claim in mine]
            ends = [
                interval(np.array(claim.differences)) if enough else (mean, mean)
                for claim, mean, enough in zip(mine, means, known, strict=True)
            ]
            errors = np.abs(np.array(ends).reshape(-1, 2) - np.array(means)[:, None]).T
            style = {"color": LINE_COLORS[i], "marker": MARKERS[i % len(MARKERS)]}
            axis.errorbar(at, means, yerr=errors, ms=4, lw=1.2, capsize=2, label=setting, **style)
        axis.axhline(0, color="0.3", lw=0.8)
        axis.axhline(claims[0].contrast.effect, color="0.3", lw=0.8, ls="--")
        axis.set_xscale("log")
        ticks = sorted({_steps(rows, claim) for claim in claims})
        axis.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        axis.minorticks_off()
        without, with_, outcome = question
        axis.set(title=f"{with_}\nagainst {without}", xlabel="training steps", ylabel=axis_label(outcome, "y", True))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _question(ablation: Ablation, judged: Verdict) -> tuple[str, ...]:
    """Both methods and the outcome of a claim, which are the same in every setting and at any number of steps."""
    method = ablation.factors[0].name
    arms = (ablation.arm(judged.contrast.without), ablation.arm(judged.contrast.with_))
    return (*(arm.levels[method] for arm in arms), judged.contrast.outcome)


def _level(ablation: Ablation, judged: Verdict, factor: str) -> str:
    return ablation.arm(judged.contrast.with_).levels[factor]


def _steps(rows: pd.DataFrame, judged: Verdict) -> float:
    return float(rows[rows["arm"] == judged.contrast.with_]["config.steps"].astype(float).mean())
