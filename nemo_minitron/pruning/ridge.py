"""Ridge least squares from second moments, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def ridge(gram: Tensor, cross: Tensor, strength: float) -> Tensor:
    """The X [k, m] that minimises ||A X - B||^2 + lambda ||X||^2, lambda = strength * mean(diag(A^T A)).

    Where the gram matrix is still singular with that, lambda grows tenfold until it is not.

    Args:
        gram: A^T A [k, k], or a multiple of it.
        cross: A^T B [k, m], the same multiple.
    """
    import torch

    gram, cross = gram.double(), cross.double()
    scale = float(gram.diagonal().mean())
    if not scale:
        return torch.zeros_like(cross)
    while True:
        shifted = gram.clone()
        shifted.diagonal().add_(strength * scale)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            return torch.cholesky_solve(cross, factor)
        strength = max(10 * strength, 1e-10)
