"""How torch runs a loss at the moment: plainly, while a graph is traced, or under a functional transform.

Plainly, the values of tensors can be read, and the differentiable step is a lean autograd.Function. In all
other cases it is one operator that hides what it does (:mod:`pysupcon.pairs.opaque`).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NO_FORWARD_MODE", "ONCE_ONLY", "batched", "check_mode", "runs_plainly", "transformed"]

NO_FORWARD_MODE = (
    "pysupcon's kernels have no forward-mode derivative (jvp, jacfwd, hessian, linearize, dual numbers): "
    'backend="reference" (dense, small batches) has; reverse mode (backward, torch.func.grad, jacrev) works '
    "with every backend"
)
ONCE_ONLY = (
    "pysupcon's losses can be differentiated once only: autograd cannot follow how their gradient "
    'depends on its inputs; backend="reference" (dense, small batches) supports second derivatives'
)
_JIT = (
    "pysupcon's kernels cannot be traced by torch.jit.trace: torch.export and torch.compile can trace them, "
    'and torch.jit.trace can trace backend="reference" (dense, small batches)'
)
_GATHER = (
    "gather works with backward(), not under torch.func's transforms (grad, vmap, jvp, ...): the rows of the "
    'other processes are out of their sight; without gather they work, jvp with backend="reference"'
)


def transformed() -> bool:
    """Whether torch.func.grad, vmap, jvp or another functional transform is at work."""
    return bool(torch._C._are_functorch_transforms_active())


def batched(tensor: Tensor) -> bool:
    """Whether it stands for several tensors: of vmap, or of torch.autograd.grad(is_grads_batched=True)."""
    functorch = torch._C._functorch
    return bool(functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor))


def runs_plainly(tensor: Tensor) -> bool:
    """False while torch.compile, torch.export or make_fx trace, for fake and meta tensors, under any other
    dispatch mode, and under functional transforms."""
    return not (
        torch.compiler.is_compiling()
        or transformed()
        or torch._C._len_torch_dispatch_stack()
        or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
        or tensor.is_meta
    )


def check_mode(features: Tensor, gathered: bool) -> None:
    """Refuses what a streaming backend cannot do.

    Operators pass no tangents on: where a loss does not run plainly they would be lost without a word.
    Plainly, the autograd.Function refuses them.
    """
    if runs_plainly(features):
        if torch.jit.is_tracing():
            raise RuntimeError(_JIT)
        return
    if torch.autograd.forward_ad._current_level >= 0:
        raise RuntimeError(NO_FORWARD_MODE)
    if gathered and transformed():
        raise RuntimeError(_GATHER)
