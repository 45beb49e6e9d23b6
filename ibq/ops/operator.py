"""Index backpropagation as a torch operator with its own backward pass: what does not depend on how the logits are computed.

`ibq::index_backprop` and `ibq::index_backprop_backward` are opaque to torch.compile, which sees their shapes alone. With p̄ the mean
assignment over all processes, g the gradient of z_q, g_H and g_A those of the sample and the codebook entropy (PAPER sections 3 and 4):
    v = -(log(p̄ + eps) + p̄ / (p̄ + eps)) g_A / N,   sharpness = g_H / N,
and `ibq.ops.chunked.backward` states the rest. Suffixes: N tokens, D code dimension, K codes, S = 3 statistics of
a row.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from ibq.errors import NonFiniteElsewhereError, NonFiniteInputError
from ibq.ops import chunked, tiled
from ibq.ops.dense import ENTROPY_EPS, Result
from ibq.ops.precision import full_float32

_COMPUTED_BY: dict[str, ModuleType] = {"chunked": chunked, "triton": tiled}


def operator(
    z_ND: torch.Tensor,
    codebook_KD: torch.Tensor,
    temperature: float | None,
    group: dist.ProcessGroup | None,
    matmul_dtype: torch.dtype,
    backend: str,
) -> Result:
    """z_q, indices, sample entropy, codebook entropy; see `ibq.ops.index_backprop`."""
    name = "" if group is None else group.group_name
    z_q_ND, indices_N, sample_entropy, codebook_entropy, *_ = torch.ops.ibq.index_backprop(
        z_ND, codebook_KD, temperature, name, matmul_dtype, backend
    )
    return (z_q_ND, indices_N, None, None) if temperature is None else (z_q_ND, indices_N, sample_entropy, codebook_entropy)


def require_finite(group: str = "", **tensors: torch.Tensor) -> None:
    """Refuse NaN and infinity by name: an argmax over them means nothing, and one such row poisons every code.

    Raises:
        NonFiniteInputError: how many values of which tensor; every process of the group raises, so that none waits for another.
    """
    bounds = torch.stack([bound for tensor in tensors.values() for bound in tensor.detach().aminmax()])
    finite = bounds.isfinite().all()
    if group:
        dist.all_reduce(finite_everywhere := finite.int(), op=dist.ReduceOp.MIN, group=_resolved(group))
    else:
        finite_everywhere = finite
    if finite_everywhere:
        return
    for name, tensor in tensors.items():
        if bad := tensor.numel() - int(tensor.isfinite().sum()):
            raise NonFiniteInputError(
                f"{bad} of {tensor.numel()} values of {name} are NaN or infinite; lower the learning rate, or check what went in"
            )
    raise NonFiniteElsewhereError("another process has values that are NaN or infinite; lower the learning rate, or check what went in")


def _resolved(group: str) -> dist.ProcessGroup:
    return c10d._resolve_process_group(group)  # type: ignore[attr-defined, arg-type]


# torch.library's lower level: custom_op would import all of torch.compile (1.5 s, 150 MB) at the first call
_HOW = "float? temperature, str group, ScalarType matmul_dtype, str backend"
_TAGS = (torch.Tag.cudagraph_unsafe,)  # the check for finite inputs waits for the device
torch.library.define(
    "ibq::index_backprop", f"(Tensor z, Tensor codebook, {_HOW}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", tags=_TAGS
)
torch.library.define(
    "ibq::index_backprop_backward",
    "(Tensor? g, Tensor? g_sample, Tensor? g_codebook, Tensor z, Tensor codebook, Tensor indices, Tensor mean, Tensor statistics, "
    f"{_HOW}) -> (Tensor, Tensor)",
    tags=_TAGS,
)


@torch.library.impl("ibq::index_backprop", "default")
def _forward(
    z_ND: torch.Tensor, codebook_KD: torch.Tensor, temperature: float | None, group: str, matmul_dtype: torch.dtype, backend: str
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
        dist.all_reduce(tensor, group=_resolved(group))
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
    dC_KD = codebook_KD.new_zeros(codebook_KD.shape) if g_ND is None else hard(g_ND, indices_N, len(codebook_KD), -1, False)
    with full_float32(z_ND.device), torch.cuda.device_of(z_ND):
        compute = _COMPUTED_BY[backend].backward
        compute(dz_ND, dC_KD, z_ND, codebook_KD, g_ND, sharpness, v_K, statistics_SN, temperature, matmul_dtype)
    return dz_ND, dC_KD


# --- Shapes, for torch.compile -----------------------------------------------------------------------------------------------------------


@torch.library.register_fake("ibq::index_backprop")
def _(
    z_ND: torch.Tensor, codebook_KD: torch.Tensor, temperature: float | None, group: str, matmul_dtype: torch.dtype, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    N, K = z_ND.shape[0], codebook_KD.shape[0]  # len() would fix a size that torch.compile holds open
    scalars = (z_ND.new_empty(()), z_ND.new_empty(()))
    mean_K = z_ND.new_empty(0 if temperature is None else K)
    return z_ND.new_empty(z_ND.shape), z_ND.new_empty(N, dtype=torch.int64), *scalars, mean_K, z_ND.new_empty(3, N)


@torch.library.register_fake("ibq::index_backprop_backward")
def _(g_ND: Any, g_sample: Any, g_codebook: Any, z_ND: torch.Tensor, codebook_KD: torch.Tensor, *_: Any) -> Any:
    return z_ND.new_empty(z_ND.shape), codebook_KD.new_empty(codebook_KD.shape)


# --- Derivatives -------------------------------------------------------------------------------------------------------------------------


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
    raise RuntimeError("index_backprop has no second derivative; keep it out of gradient penalties, or use backend='dense'")


torch.library.register_autograd("ibq::index_backprop", _derive, setup_context=_keep)
torch.library.register_autograd("ibq::index_backprop_backward", _refuse)
