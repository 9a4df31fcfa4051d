"""The mode in which torch runs a loss: eager, traced, or under a functional transform.

In eager mode the values of tensors can be read, and the differentiable step is a lean autograd.Function. In
all other modes the differentiable step is one custom operator (:mod:`pysupcon.pairs.custom_op`).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NO_FORWARD_MODE", "ONCE_ONLY", "check_mode", "is_batched", "is_eager", "is_transformed"]

NO_FORWARD_MODE = (
    "pysupcon's kernels have no forward-mode derivative (jvp, jacfwd, hessian, linearize, dual numbers): "
    'backend="reference" (dense, small batches) supports it; reverse mode (backward, torch.func.grad, '
    "jacrev) works with every backend"
)
ONCE_ONLY = (
    "pysupcon's losses can be differentiated once only: autograd cannot follow how their gradient "
    'depends on its inputs; backend="reference" (dense, small batches) supports second derivatives'
)
_NO_JIT_TRACE = (
    "pysupcon's kernels cannot be traced by torch.jit.trace: torch.export and torch.compile can trace them, "
    'and torch.jit.trace can trace backend="reference" (dense, small batches)'
)
_NO_GATHER = (
    "gather works with backward(), not under the transforms of torch.func (grad, vmap, jvp, ...), which "
    "cannot transform the rows of other processes; without gather the transforms work (jvp with "
    'backend="reference")'
)


def is_transformed() -> bool:
    """Whether torch.func.grad, vmap, jvp or another functional transform is active."""
    return bool(torch._C._are_functorch_transforms_active())


def is_batched(tensor: Tensor) -> bool:
    """Whether vmap or torch.autograd.grad(is_grads_batched=True) batches the tensor."""
    functorch = torch._C._functorch
    return bool(functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor))


def is_eager(tensor: Tensor) -> bool:
    """Whether an operation on the tensor runs at once and on real values.

    False while torch.compile, torch.export or make_fx trace, for fake and meta tensors, under any other
    dispatch mode, and under functional transforms.
    """
    return not (
        torch.compiler.is_compiling()
        or is_transformed()
        or torch._C._len_torch_dispatch_stack()
        or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
        or tensor.is_meta
    )


def check_mode(features: Tensor, gathered: bool) -> None:
    """Refuses modes that a streaming backend does not support.

    Outside of eager mode the custom operator would silently drop tangents; in eager mode the
    autograd.Function refuses them.

    Args:
        features: of the loss.
        gathered: whether the loss communicates with other processes.

    Raises:
        RuntimeError: torch.jit.trace, forward-mode differentiation, or a transform of a gathered loss.
    """
    if is_eager(features):
        if torch.jit.is_tracing():
            raise RuntimeError(_NO_JIT_TRACE)
        return
    if torch.autograd.forward_ad._current_level >= 0:
        raise RuntimeError(NO_FORWARD_MODE)
    if gathered and is_transformed():
        raise RuntimeError(_NO_GATHER)
