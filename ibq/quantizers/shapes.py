"""Shapes that a quantizer takes: a feature map (B, D, H, W), a sequence (B, N, D) or a video (B, D, T, H, W).

Indices and masks have the shape without D, the grid: (B, H, W), (B, N) or (B, T, H, W); so the number of dimensions
tells which it is. Only a sequence has D last. Suffix: N tokens of all of them together, in the order of the grid.
"""

from __future__ import annotations

import torch

from ibq.ops.arguments import integers

FEATURES = "(B, code_dim, H, W), (B, N, code_dim) or (B, code_dim, T, H, W)"
GRIDS = "(B, H, W), (B, N) or (B, T, H, W)"


def tokens_last(z: torch.Tensor, code_dim: int) -> torch.Tensor:
    """Features with D as the last dimension, after their grid.

    Raises:
        ValueError: they are no real tensor, have another number of dimensions or channels, or no token.
    """
    if not isinstance(z, torch.Tensor) or z.is_complex():
        kind = z.dtype if isinstance(z, torch.Tensor) else f"a {type(z).__name__}"
        raise ValueError(f"features are {kind}; pass a tensor of real numbers")
    channel = {3: 2, 4: 1, 5: 1}.get(z.dim())
    if channel is None or z.shape[channel] != code_dim:
        raise ValueError(f"features of shape {tuple(z.shape)} do not fit code_dim={code_dim}; pass {FEATURES}")
    if z.numel() == 0:
        raise ValueError(f"features of shape {tuple(z.shape)} hold no token; pass at least one")
    return z.movedim(channel, -1)


def of_grid(rows_ND: torch.Tensor, grid: torch.Size) -> torch.Tensor:
    """Features of a grid from its tokens: the opposite of `tokens_last`."""
    z = rows_ND.reshape(*grid, rows_ND.shape[-1])
    return z if len(grid) == 2 else z.movedim(-1, 1)


def kept_tokens(mask: torch.Tensor, grid: torch.Size) -> torch.Tensor:
    """A mask (N,) of the tokens of a grid.

    Raises:
        ValueError: it is of another shape or type, or keeps no token.
    """
    if mask.dtype != torch.bool or mask.shape != grid:
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} and {mask.dtype} does not fit the tokens; pass bool of shape "
            f"{tuple(grid)}, True where a token counts"
        )
    if not mask.any():
        raise ValueError(f"the mask of shape {tuple(mask.shape)} keeps no token; keep at least one")
    return mask.flatten()


def require_indices(indices: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """Indices as int64.

    Raises:
        ValueError: they are not integers, their shape is not a grid's, or they lie outside [0, K).
    """
    indices = integers("indices", indices, codebook_size)
    if indices.dim() not in (2, 3, 4):
        raise ValueError(f"indices of shape {tuple(indices.shape)} are not those of a grid; pass {GRIDS}")
    if indices.numel() and not torch.compiler.is_exporting():  # an exported graph cannot branch on values
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= codebook_size:
            raise ValueError(f"indices reach from {low} to {high}; they must lie in [0, {codebook_size})")
    return indices
