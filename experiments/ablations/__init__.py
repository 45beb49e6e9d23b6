"""The ablations, one file each; `ABLATIONS` lists them in the order of their notebooks, `CORE` those that a study without names has."""

from experiments.ablations import double_quant_loss, quantizers, vq_vs_ibq
from experiments.ablations.base import Ablation, Anatomy, Arm, Contrast, Factor, PaperRow, Part, Tuning

ABLATIONS: dict[str, Ablation] = {module.ABLATION.name: module.ABLATION for module in (vq_vs_ibq, double_quant_loss, quantizers)}
CORE = tuple(ablation.name for ablation in ABLATIONS.values() if ablation.core)

__all__ = ["ABLATIONS", "CORE", "Ablation", "Anatomy", "Arm", "Contrast", "Factor", "PaperRow", "Part", "Tuning"]
