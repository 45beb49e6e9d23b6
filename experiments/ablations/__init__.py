"""The ablations, one file each; `ABLATIONS` lists them in the order of their notebooks, `CORE` those that a study
without names has, `ALL` those of a study of all."""

from experiments.ablations import (
    code_dimension,
    codebook_size,
    collapse_atlas,
    double_quant_loss,
    evidence,
    generation,
    lfq_comparison,
    model_size,
    objective,
    quantizers,
    recipe_parts,
    second_collapse,
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
from experiments.ablations.quantizers.yours import with_plugins
from ibq.plugins import load_plugins, loaded, wanted

_IN_ORDER = (
    vq_vs_ibq,
    recipe_parts,
    double_quant_loss,
    codebook_size,
    code_dimension,
    lfq_comparison,
    model_size,
    quantizers,
    objective,
    generation,
    collapse_atlas,
    second_collapse,
    evidence,
)
ABLATIONS: dict[str, Ablation] = {module.ABLATION.name: module.ABLATION for module in _IN_ORDER}


def include_plugins() -> None:
    """Give the comparison of quantizers the arms of all plugins, which are loaded if they have not been.

    Raises:
        ConfigError: a plugin cannot be loaded, or an arm's name is taken.
    """
    load_plugins()
    ablation = with_plugins(quantizers.ABLATION, loaded(), quantizers.STEP_SHARE)
    if ablation != ABLATIONS[ablation.name]:
        ABLATIONS[ablation.name] = ablation


if wanted():
    include_plugins()
CORE = (vq_vs_ibq.ABLATION.name,)
"""Those of a study without names."""
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
    "include_plugins",
]
