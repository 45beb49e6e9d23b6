"""The ablations, one file each; `ABLATIONS` lists them in the order of their notebooks, `CORE` those that a study without names has."""

from experiments.ablations import (
    code_dimension,
    codebook_size,
    double_quant_loss,
    generation,
    lfq_comparison,
    model_size,
    objective,
    quantizers,
    vq_vs_ibq,
)
from experiments.ablations.base import Ablation, Anatomy, Arm, Axis, Continuation, Contrast, Factor, PaperRow, Part, Tuning

_IN_ORDER = (vq_vs_ibq, double_quant_loss, codebook_size, code_dimension, lfq_comparison, model_size, quantizers, objective, generation)
ABLATIONS: dict[str, Ablation] = {module.ABLATION.name: module.ABLATION for module in _IN_ORDER}
CORE = tuple(ablation.name for ablation in ABLATIONS.values() if ablation.core)

__all__ = ["ABLATIONS", "CORE", "Ablation", "Anatomy", "Arm", "Axis", "Continuation", "Contrast", "Factor", "PaperRow", "Part", "Tuning"]
