"""Metrics, each with its protocol: code usage from counts, image quality from reconstructions."""

from ibq.metrics.quality import ImageQuality
from ibq.metrics.usage import expected_uniform, usage_metrics

__all__ = ["ImageQuality", "expected_uniform", "usage_metrics"]
