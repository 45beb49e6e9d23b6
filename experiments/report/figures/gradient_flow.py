"""Pictures of one step of vector quantization and of index backpropagation, on codes in the plane: what notebook 00
shows.

Both methods get the same codes, features and loss, the reconstruction |z_q - t|^2 with a decoder that is the identity;
they differ in what they make of its gradient. Suffixes: N features, K codes, D code dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.report.figures import COLORS, theme
from ibq.metrics.codebook import gradient_reach
from ibq.quantizers import build_quantizer

METHODS = ("vq", "ibq")
TITLES = {"vq": "VQ", "ibq": "IBQ"}
SETTINGS = {"codebook_init": "normal", "beta_on": "commitment", "entropy_weight": 0.0}
"""Equal for both, so that the pictures show the gradient's way and nothing else."""


@dataclass(frozen=True)
class Step:
    """One step of one method: codes (K, 2), features and their targets (N, 2), indices (N,), and the gradient of the
    codes (K, 2)."""

    codes_KD: torch.Tensor
    z_ND: torch.Tensor
    target_ND: torch.Tensor
    indices_N: torch.Tensor
    gradient_KD: torch.Tensor


def one_step(method: str, seed: int = 0, codes: int = 64, features: int = 192) -> Step:
    """Features in three groups beside N(0, 1) codes; the targets lie a little further out, as if the encoder still had
    to move."""
    generator = torch.Generator().manual_seed(seed)
    codes_KD = torch.randn(codes, 2, generator=generator)
    centers_D = torch.tensor([[1.6, 0.4], [-0.3, 1.5], [0.9, -1.3]])
    z_ND = centers_D.repeat_interleave(features // 3, 0) + 0.25 * torch.randn(features // 3 * 3, 2, generator=generator)
    config = {"method": method, "codebook_size": codes, "code_dim": 2, **SETTINGS} | (
        {"double": False} if method == "ibq" else {}
    )
    quantizer = build_quantizer(config)
    with torch.no_grad():
        quantizer.codebook.copy_(codes_KD)
    target_ND = 1.15 * z_ND
    quantized = quantizer(z_ND.T[None, :, :, None])
    z_q_ND = quantized.z_q[0, :, :, 0].T
    loss = (z_q_ND - target_ND).square().mean() + quantized.losses["codebook"]
    (gradient_KD,) = torch.autograd.grad(loss, quantizer.codebook)
    return Step(codes_KD, z_ND, target_ND, quantized.indices.flatten(), gradient_KD)


def reach_table(seed: int = 0) -> pd.DataFrame:
    """Number of codes that each method moves in that step."""
    lines = []
    for method in METHODS:
        step = one_step(method, seed)
        reach = gradient_reach(step.gradient_KD)
        lines.append(
            {
                "method": TITLES[method],
                "codes": len(step.codes_KD),
                "selected by a feature": len(step.indices_N.unique()),
                "with a gradient": int((step.gradient_KD != 0).any(1).sum()),
                "gradient above Adam's eps": round(reach["reach_above_eps"] * len(step.codes_KD)),
                "effective reach (codes)": f"{reach['reach_effective']:.1f}",
            }
        )
    return pd.DataFrame(lines)


def gradient_arrows(seed: int = 0) -> Figure:
    """Moves of every code in one step, VQ beside IBQ; arrows of equal length, their colour is the gradient's size."""
    theme()
    figure, axes = plt.subplots(1, 2, figsize=(9.4, 4.6), sharex=True, sharey=True)
    steps = {method: one_step(method, seed) for method in METHODS}
    greatest = max(float(step.gradient_KD.norm(dim=1).max()) for step in steps.values())
    for axis, (method, step) in zip(axes, steps.items(), strict=True):
        norm_K = step.gradient_KD.norm(dim=1)
        moved_K = norm_K > 0
        axis.scatter(*step.z_ND.T, s=5, color="0.75", linewidths=0)
        axis.scatter(*step.codes_KD[~moved_K].T, s=22, color=COLORS[3], marker="x", linewidths=1)
        axis.scatter(*step.codes_KD[moved_K].T, s=12, color="0.1", linewidths=0, zorder=3)
        direction_KD = -0.28 * step.gradient_KD[moved_K] / norm_K[moved_K, None]
        exponent_K = (norm_K[moved_K] / greatest).log10().clamp_min(-4)
        arrows = axis.quiver(
            *step.codes_KD[moved_K].T, *direction_KD.T, exponent_K, cmap="viridis_r", clim=(-4, 0), angles="xy",
            scale_units="xy", scale=1,
            width=0.0055, zorder=2,
        )  # fmt: skip
        axis.set(
            title=f"{TITLES[method]}: a gradient for {int(moved_K.sum())} of {len(norm_K)} codes",
            aspect="equal",
            xticks=[],
            yticks=[],
        )
    figure.colorbar(arrows, ax=axes, shrink=0.85, label="log10 of the gradient's size, relative to the greatest")
    handles = [
        Line2D([], [], ls="", marker="o", ms=4, color="0.75", label="features"),
        Line2D([], [], ls="", marker="o", ms=5, color="0.1", label="codes with a gradient"),
        Line2D([], [], ls="", marker="x", ms=6, color=COLORS[3], label="codes without any"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def one_feature(seed: int = 0, feature: int = 0) -> Figure:
    """The index of one feature, hard and soft, and the gradient of its logits: how all codes come to move."""
    theme()
    step = one_step("ibq", seed)
    z_D, target_D = step.z_ND[feature], step.target_ND[feature]
    logits_K = step.codes_KD @ z_D
    p_K = logits_K.softmax(0)
    chosen = int(p_K.argmax())
    g_D = 2 * (step.codes_KD[chosen] - target_D)
    pull_K = step.codes_KD @ g_D
    dlogits_K = p_K * (pull_K - (p_K * pull_K).sum())
    figure, axes = plt.subplots(1, 3, figsize=(11.6, 4.3), sharex=True, sharey=True)
    titles = (
        "forward: onehot(argmax z·c)",
        "what carries the gradient: p = softmax(z·c)",
        "gradient of the logits: p (g·c − Σ p g·c)",
    )
    onehot_K = torch.zeros_like(p_K)
    onehot_K[chosen] = 1.0
    for axis, title, size_K, sign_K in zip(
        axes,
        titles,
        (onehot_K, p_K, dlogits_K.abs() / dlogits_K.abs().max()),
        (None, None, dlogits_K.sign()),
        strict=True,
    ):
        axis.scatter(*step.codes_KD.T, s=6, color="0.6", linewidths=0)
        colors = [COLORS[0]] * len(size_K) if sign_K is None else [COLORS[3] if s > 0 else COLORS[2] for s in sign_K]
        axis.scatter(*step.codes_KD.T, s=(600 * size_K).numpy(), color=colors, alpha=0.55, linewidths=0)
        axis.scatter(*z_D, s=110, color="0.1", marker="*", zorder=4)
        axis.set(title=title, aspect="equal", xticks=[], yticks=[])
    handles = [
        Line2D([], [], ls="", marker="*", ms=9, color="0.1", label="feature z"),
        Line2D([], [], ls="", marker="o", ms=4, color="0.6", label="codes"),
        Line2D([], [], ls="", marker="o", ms=8, color=COLORS[0], alpha=0.55, label="weight (area)"),
        Line2D([], [], ls="", marker="o", ms=8, color=COLORS[2], alpha=0.55, label="logit is raised"),
        Line2D([], [], ls="", marker="o", ms=8, color=COLORS[3], alpha=0.55, label="logit is lowered"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    return figure


def reach_by_dimension(seed: int = 0, codes: int = 1024, features: int = 512) -> Figure:
    """Effective number of codes of p (the exponential of its entropy) against D at N(0, 1), mean over features.

    Plain logits spread as sqrt(D), so that their softmax becomes one-hot again: the gradient is back at the selected
    code.
    """
    theme()
    dims = [2, 4, 8, 16, 32, 64, 128, 256]
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.4))
    for label, scaled, color in (
        ("plain logits z·c, as released", False, COLORS[0]),
        ("logits / sqrt(D)", True, COLORS[1]),
    ):
        reach, sharpness = [], []
        for D in dims:
            generator = torch.Generator().manual_seed(seed)
            z_ND, codes_KD = torch.randn(features, D, generator=generator), torch.randn(codes, D, generator=generator)
            logits_NK = z_ND @ codes_KD.T / (D**0.5 if scaled else 1.0)
            p_NK = logits_NK.softmax(1)
            sharpness.append(float(p_NK.amax(1).mean()))
            reach.append(float((-torch.special.xlogy(p_NK, p_NK).sum(1)).exp().mean()))
        axes[0].plot(dims, reach, marker="o", ms=4, color=color, label=label)
        axes[1].plot(dims, sharpness, marker="o", ms=4, color=color, label=label)
    axes[0].set(yscale="log", ylabel=f"codes under p, of {codes:,}")
    axes[1].set(ylabel="greatest probability", ylim=(0, 1))
    for axis in axes:
        axis.set(xscale="log", xlabel="code dimension D")
        axis.set_xticks(dims, [str(D) for D in dims])
        axis.minorticks_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure
