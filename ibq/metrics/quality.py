"""Image quality: L1, PSNR and SSIM of each image, then the mean over images, summed exactly.

Protocol: images in [-1, 1], reconstructions clamped to it, not rounded to 8 bits; SSIM on
[0, 1] with the 11 x 11 Gaussian window of sigma 1.5. A mean of batch means is not used anywhere, so the batch
size changes nothing. Suffixes: B images, C channels, H W pixels.
"""

from __future__ import annotations

import math

import torch

from ibq.distributed import gather_objects

RELEASED_PSNR = "the released code takes bytes, cut and not rounded"
RELEASED_SSIM = "the released code takes bytes, cut and not rounded, in a 7×7 uniform window"
"""Beside numbers that a reader may compare with those of the released code."""
SSIM_WINDOW = 11


class ImageQuality:
    """Accumulator of pairs of batches; `compute` gives the means.

    Sums are exact, so that neither the order nor the batches of the images change them.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {"l1": [], "mse": [], "psnr_db": [], "ssim": []}

    @property
    def images(self) -> int:
        return len(self._values["l1"])

    @property
    def without_ssim(self) -> int:
        """Number of images that are smaller than the SSIM window."""
        return self.images - len(self._values["ssim"])

    def update(self, originals_BCHW: torch.Tensor, reconstructions_BCHW: torch.Tensor) -> None:
        """Add a batch.

        Args:
            originals_BCHW: float in [-1, 1], of any H and W.
            reconstructions_BCHW: the same shape; clamped here.

        Raises:
            ValueError: shapes differ or the originals leave [-1, 1].
        """
        if originals_BCHW.shape != reconstructions_BCHW.shape:
            shapes = f"{tuple(originals_BCHW.shape)} and {tuple(reconstructions_BCHW.shape)}"
            raise ValueError(f"originals and reconstructions must share one shape, not {shapes}")
        if float(originals_BCHW.abs().max()) > 1:
            raise ValueError(
                f"originals reach {float(originals_BCHW.abs().max()):.3f} in magnitude; scale them to [-1, 1]"
            )
        values = pixel_errors(originals_BCHW, reconstructions_BCHW)
        if min(originals_BCHW.shape[2:]) >= SSIM_WINDOW:
            values["ssim"] = ssim(originals_BCHW, reconstructions_BCHW)
        for name, values_B in values.items():
            self._values[name] += values_B.tolist()

    def reduce(self) -> None:
        """Take in what the other processes have measured; a collective, once, after the last update."""
        of_ranks = gather_objects(self._values)
        self._values = {name: [value for values in of_ranks for value in values[name]] for name in self._values}

    def compute(self) -> dict[str, float]:
        """Means over all images: l1 and mse in units of [-1, 1], psnr_db in dB, ssim in [-1, 1], which is left out
        where an image is smaller than its window."""
        n = self.images
        return {name: math.fsum(values) / n for name, values in self._values.items() if len(values) == n}


def pixel_errors(originals_BCHW: torch.Tensor, reconstructions_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
    """l1, mse and psnr_db of each image (B,), float64; the reconstructions are clamped here."""
    x, y = originals_BCHW.double(), reconstructions_BCHW.float().clamp(-1, 1).double()
    mse_B = (x - y).square().mean((1, 2, 3))
    psnr_B = 10 * torch.log10(4 / mse_B.clamp_min(1e-10))  # peak-to-peak 2; an exact copy counts as 106 dB
    return {"l1": (x - y).abs().mean((1, 2, 3)), "mse": mse_B, "psnr_db": psnr_B}


def ssim(originals_BCHW: torch.Tensor, reconstructions_BCHW: torch.Tensor) -> torch.Tensor:
    """SSIM of each image (B,), float64; H and W at least SSIM_WINDOW; the reconstructions are clamped here."""
    # torchmetrics takes longer to import than everything else together, and a command line that only lists runs needs
    # none of it
    from torchmetrics.functional.image import structural_similarity_index_measure

    y_BCHW = reconstructions_BCHW.float().clamp(-1, 1)
    # in float32, where its window sums are ten times faster than in float64
    ssim_B = structural_similarity_index_measure(
        (y_BCHW + 1) / 2, (originals_BCHW.float() + 1) / 2, data_range=1.0, reduction="none"
    )
    assert isinstance(ssim_B, torch.Tensor)
    return ssim_B.double()
