"""The ablations, one file each; `ABLATIONS` lists them in the order of their notebooks, `CORE` those that a study
without names has, `ALL` those of a study of all."""

from experiments.ablations import (
    code_dimension,
    codebook_size,
    collapse_atlas,
    double_quant_loss,
    generation,
    lfq_comparison,
    model_size,
    objective,
    quantizers,
    vq_vs_ibq,
)
from experiments.ablations.base import (
    Ablation,
    Adaptive,
    Arm,
    Axis,
    Contrast,
    Factor,
    PaperRow,
    Trial,
)

_IN_ORDER = (
    vq_vs_ibq,
    double_quant_loss,
    codebook_size,
    code_dimension,
    lfq_comparison,
    model_size,
    quantizers,
    objective,
    generation,
    collapse_atlas,
)
ABLATIONS: dict[str, Ablation] = {module.ABLATION.name: module.ABLATION for module in _IN_ORDER}
CORE = tuple(ablation.name for ablation in ABLATIONS.values() if ablation.core)
ALL = tuple(ablation.name for ablation in ABLATIONS.values() if not ablation.on_request)

__all__ = [
    "ABLATIONS",
    "ALL",
    "CORE",
    "Ablation",
    "Adaptive",
    "Arm",
    "Axis",
    "Contrast",
    "Factor",
    "PaperRow",
    "Trial",
]
