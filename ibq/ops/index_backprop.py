"""Index backpropagation (arXiv 2412.02692, algorithm 1): the public function, and the torch operator with its own
backward pass.

`ibq::index_backprop` and `ibq::index_backprop_backward` are opaque to torch.compile, which sees their shapes alone.
With p̄ the mean assignment over all processes, g the gradient of z_q, g_H and g_A those of the sample and the codebook
entropy (docs/method.md sections 3 and 4):
    v = -(log(p̄ + eps) + p̄ / (p̄ + eps)) g_A / N,   sharpness = g_H / N,
and `ibq.ops.chunked.backward` states the rest, which depends on how the logits are computed. Suffixes: N tokens, D code
dimension, K codes, S = 3 statistics of a row.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from ibq.ops import chunked, triton
from ibq.ops.arguments import checked, choose_backend, require_finite, resolve_group
from ibq.ops.precision import full_float32
from ibq.ops.reference import ENTROPY_EPS, Result, dense
from ibq.schema import Backend

_COMPUTED_BY: dict[str, ModuleType] = {"chunked": chunked, "triton": triton}


def index_backprop(
    z_ND: torch.Tensor,
    codebook_KD: torch.Tensor,
    *,
    entropy_temperature: float | None = 0.01,
    backend: Backend = "auto",
    matmul_dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
) -> Result:
    """Quantize by index backpropagation (arXiv 2412.02692, algorithm 1).

    z_q = Ind C with Ind = onehot(argmax p) + p - sg(p) and p = softmax(z C^T); gradients equal autograd's through that
    formula (on chunks no probability counts as less than e^-60 of its row's greatest, in float64 e^-600). Everything
    but the factors of matrix products is float32 or, for float64 inputs, float64, whatever autocast says.

    Args:
        z_ND: features (N, D), floating, finite.
        codebook_KD: codes (K, D) on the same device, floating, finite.
        entropy_temperature: tau of the softmax whose entropies are returned, 1e-30 to 1e30; None leaves them out.
        backend: "dense" holds several (N, K) matrices; "chunked" (any device) and "triton" (CUDA) add memory of order N
            + K only. "auto" is Triton for bfloat16 products on CUDA, else chunks.
        matmul_dtype: type to which the factors of matrix products are rounded; their sums and all else stay float32.
            None: bfloat16 when both inputs are, else float32 (never TF32) or float64.
        group: processes over which the mean assignment is averaged, forward and backward; None keeps it local, as
            released. Then all of them call this with a temperature, and all use the codebook entropy in their loss or
            none does.

    Returns:
        z_q (N, D), whose value is exactly the gathered codes; indices (N,) int64, ties to the lower index; the mean
        over tokens of the entropy of p_tau, and the entropy -sum p log(p + 1e-5) of the mean of p_tau, in nats (None
        without a temperature). float32, or float64 when an input is. Differentiable once.

    Raises:
        ValueError: shapes, devices or types that do not fit, with both values; a backend that cannot run here, with the
            reason.
        NonFiniteInputError: a ValueError; features or codes hold NaN or infinity, on this or another process of the
            group. Finite ones whose logits overflow are not noticed here.
    """
    inputs_are_bfloat16 = z_ND.dtype == codebook_KD.dtype == torch.bfloat16
    z_ND, codebook_KD = checked(z_ND, codebook_KD)
    if entropy_temperature is not None and not 1e-30 <= entropy_temperature <= 1e30:
        raise ValueError(
            f"entropy_temperature={entropy_temperature} must lie between 1e-30 and 1e30, or be None for no entropies"
        )
    if matmul_dtype is None:
        matmul_dtype = torch.bfloat16 if inputs_are_bfloat16 else z_ND.dtype
    if matmul_dtype != z_ND.dtype and (matmul_dtype, z_ND.dtype) != (torch.bfloat16, torch.float32):
        raise ValueError(
            f"matmul_dtype={matmul_dtype} does not fit {z_ND.dtype}; use None, or torch.bfloat16 for float32"
        )
    chosen = choose_backend(backend, z_ND.device, matmul_dtype)
    if torch.compiler.is_exporting():  # a graph for other runtimes has torch's own operators alone
        chosen = "dense"
    if chosen != "dense":
        return _operator(z_ND, codebook_KD, entropy_temperature, group, matmul_dtype, chosen)
    shared = "" if group is None or entropy_temperature is None else group.group_name
    require_finite(shared, features=z_ND, codebook=codebook_KD)
    with full_float32(z_ND.device):
        return dense(z_ND, codebook_KD, entropy_temperature, group, matmul_dtype)


def _operator(
    z_ND: torch.Tensor,
    codebook_KD: torch.Tensor,
    temperature: float | None,
    group: dist.ProcessGroup | None,
    matmul_dtype: torch.dtype,
    backend: str,
) -> Result:
    """z_q, indices, sample entropy, codebook entropy; see `index_backprop`."""
    name = "" if group is None else group.group_name
    z_q_ND, indices_N, sample_entropy, codebook_entropy, *_ = torch.ops.ibq.index_backprop(
        z_ND, codebook_KD, temperature, name, matmul_dtype, backend
    )
    return (
        (z_q_ND, indices_N, None, None)
        if temperature is None
        else (z_q_ND, indices_N, sample_entropy, codebook_entropy)
    )


# torch.library's lower level: custom_op would import all of torch.compile (1.5 s, 150 MB) at the first call
_HOW = "float? temperature, str group, ScalarType matmul_dtype, str backend"
_TAGS = (torch.Tag.cudagraph_unsafe,)  # the check for finite inputs waits for the device
torch.library.define(
    "ibq::index_backprop",
    f"(Tensor z, Tensor codebook, {_HOW}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "ibq::index_backprop_backward",
    "(Tensor? g, Tensor? g_sample, Tensor? g_codebook, Tensor z, Tensor codebook, Tensor indices, Tensor mean, Tensor "
    "statistics, "
    f"{_HOW}) -> (Tensor, Tensor)",
    tags=_TAGS,
)


@torch.library.impl("ibq::index_backprop", "default")
def _forward(
    z_ND: torch.Tensor,
    codebook_KD: torch.Tensor,
    temperature: float | None,
    group: str,
    matmul_dtype: torch.dtype,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """z_q, indices, both entropies, the mean assignment and the statistics (S, N) of the rows."""
    require_finite(group if temperature is not None else "", features=z_ND, codebook=codebook_KD)
    with full_float32(z_ND.device), torch.cuda.device_of(z_ND):
        indices_N, mean_K, statistics_SN = _COMPUTED_BY[backend].forward(z_ND, codebook_KD, temperature, matmul_dtype)
        if temperature is None:
            nothing = z_ND.new_zeros(())
            return codebook_KD[indices_N], indices_N, nothing, nothing.clone(), mean_K, statistics_SN
        mean_K /= _sum_over(group, mean_K, len(z_ND))
        codebook_entropy = -(mean_K * (mean_K + ENTROPY_EPS).log()).sum()
    return codebook_KD[indices_N], indices_N, statistics_SN[-1].mean(), codebook_entropy, mean_K, statistics_SN


def _sum_over(group: str, sum_K: torch.Tensor, tokens: int) -> int:
    """Add a tensor up over the group, in place, and the number of tokens too."""
    if not group:
        return tokens
    total = torch.tensor(tokens, device=sum_K.device)
    for tensor in (sum_K, total):
        dist.all_reduce(tensor, group=resolve_group(group))
    return int(total)


@torch.library.impl("ibq::index_backprop_backward", "default")
def _backward(
    g_ND: torch.Tensor | None,
    g_sample: torch.Tensor | None,
    g_codebook: torch.Tensor | None,
    z_ND: torch.Tensor,
    codebook_KD: torch.Tensor,
    indices_N: torch.Tensor,
    mean_K: torch.Tensor,
    statistics_SN: torch.Tensor,
    temperature: float | None,
    group: str,
    matmul_dtype: torch.dtype,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the features and of the codebook."""
    N = len(z_ND)
    v_K = None
    if g_codebook is not None:
        tokens = N
        if group:  # every rank's loss holds the shared mean, so every rank's gradient reaches this rank's tokens
            g_codebook = g_codebook.clone()
            tokens = _sum_over(group, g_codebook, N)
        v_K = -((mean_K + ENTROPY_EPS).log() + mean_K / (mean_K + ENTROPY_EPS)) * (g_codebook / tokens)
    sharpness = None if g_sample is None else g_sample / N
    dz_ND = z_ND.new_zeros(z_ND.shape)
    # the hard path onehot^T g; unlike index_add_ this adds in one order on a GPU too
    hard = torch.ops.aten.embedding_dense_backward
    dC_KD = (
        codebook_KD.new_zeros(codebook_KD.shape) if g_ND is None else hard(g_ND, indices_N, len(codebook_KD), -1, False)
    )
    with full_float32(z_ND.device), torch.cuda.device_of(z_ND):
        compute = _COMPUTED_BY[backend].backward
        compute(dz_ND, dC_KD, z_ND, codebook_KD, g_ND, sharpness, v_K, statistics_SN, temperature, matmul_dtype)
    return dz_ND, dC_KD


# --- Shapes, for torch.compile ----------------------------------------------------------------------------------------


@torch.library.register_fake("ibq::index_backprop")
def _(
    z_ND: torch.Tensor,
    codebook_KD: torch.Tensor,
    temperature: float | None,
    group: str,
    matmul_dtype: torch.dtype,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    N, K = z_ND.shape[0], codebook_KD.shape[0]  # len() would fix a size that torch.compile holds open
    scalars = (z_ND.new_empty(()), z_ND.new_empty(()))
    mean_K = z_ND.new_empty(0 if temperature is None else K)
    return z_ND.new_empty(z_ND.shape), z_ND.new_empty(N, dtype=torch.int64), *scalars, mean_K, z_ND.new_empty(3, N)


@torch.library.register_fake("ibq::index_backprop_backward")
def _(g_ND: Any, g_sample: Any, g_codebook: Any, z_ND: torch.Tensor, codebook_KD: torch.Tensor, *_: Any) -> Any:
    return z_ND.new_empty(z_ND.shape), codebook_KD.new_empty(codebook_KD.shape)


# --- Derivatives ------------------------------------------------------------------------------------------------------


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    z_ND, codebook_KD, *ctx.how = inputs
    _, indices_N, _, _, mean_K, statistics_SN = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z_ND, codebook_KD, indices_N, mean_K, statistics_SN)


def _derive(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
    g_ND, _, g_sample, g_codebook, *_ = gradients
    if ctx.how[0] is None:
        g_sample = g_codebook = None
    dz_ND, dC_KD = torch.ops.ibq.index_backprop_backward(
        None if g_ND is None else g_ND.contiguous(), g_sample, g_codebook, *ctx.saved_tensors, *ctx.how
    )
    return dz_ND, dC_KD, None, None, None, None


def _refuse(ctx: Any, *gradients: torch.Tensor) -> None:
    raise RuntimeError(
        "index_backprop has no second derivative; keep it out of gradient penalties, or use backend='dense'"
    )


torch.library.register_autograd("ibq::index_backprop", _derive, setup_context=_keep)
torch.library.register_autograd("ibq::index_backprop_backward", _refuse)
