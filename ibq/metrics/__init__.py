"""Metrics, each with its protocol: code usage from counts, image quality from reconstructions.

Those in the features of trained networks are in modules of their own, since such networks take seconds to import:
`distances` (FID and its kin), `perceptual` (LPIPS).
"""

from ibq.metrics.quality import ImageQuality
from ibq.metrics.usage import expected_uniform, usage_metrics

__all__ = ["ImageQuality", "expected_uniform", "usage_metrics"]
