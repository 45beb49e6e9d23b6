"""Gradients through a hard assignment. The value is exactly the code; codes get nothing from here. Suffixes: N tokens, D code dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def straight_through(z_ND: torch.Tensor, codes_ND: torch.Tensor) -> torch.Tensor:
    """The gradient of z_q is copied to z (VQ-VAE, arXiv 1711.00937)."""
    return codes_ND.detach() + (z_ND - z_ND.detach())


def rotation(z_ND: torch.Tensor, codes_ND: torch.Tensor) -> torch.Tensor:
    """z_q = |q|/|z| R z with the rotation R that takes z's direction to the code's, both constants (arXiv 2410.06424, eq. 4).

    So a gradient reaches z turned by the angle between z and its code, and scaled by the ratio of their lengths.
    """
    q_ND = codes_ND.detach()
    from_ND, to_ND = F.normalize(z_ND.detach(), dim=1), F.normalize(q_ND, dim=1)
    half_ND = F.normalize(from_ND + to_ND, dim=1)
    along_half_N1 = (z_ND * half_ND).sum(1, keepdim=True)
    along_from_N1 = (z_ND * from_ND).sum(1, keepdim=True)
    ratio_N1 = q_ND.norm(dim=1, keepdim=True) / z_ND.detach().norm(dim=1, keepdim=True).clamp_min(1e-12)
    rotated_ND = ratio_N1 * (z_ND - 2 * along_half_N1 * half_ND + 2 * along_from_N1 * to_ND)
    return straight_through(rotated_ND, q_ND)
