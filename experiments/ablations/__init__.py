"""The ablations, one file each; `ABLATIONS` lists them in the order of their notebooks."""

from experiments.ablations import vq_vs_ibq
from experiments.ablations.base import Ablation, Arm, Contrast, Factor, PaperRow

ABLATIONS: dict[str, Ablation] = {module.ABLATION.name: module.ABLATION for module in (vq_vs_ibq,)}

__all__ = ["ABLATIONS", "Ablation", "Arm", "Contrast", "Factor", "PaperRow"]
