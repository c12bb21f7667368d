"""Clipping of a client's gradients by their global norm."""

import torch

from fedsim.records import Params

EPS = 1e-6  # torch's


def clipped(grads: Params, max_norm: float | None) -> Params:
    """``g * min(1, max_norm / (||g|| + 1e-6))``, with ||g|| the Euclidean norm of all gradients together.

    Args:
        grads: of one client; map it over several with ``torch.func.vmap``.
        max_norm: > 0; None leaves the gradients as they are.

    Source: Pascanu et al. 2013, "On the difficulty of training recurrent neural networks", algorithm 1, in the form
        of ``torch.nn.utils.clip_grad_norm_``. Differs: none.
    """
    if max_norm is None:
        return grads
    norms = torch.stack([torch.linalg.vector_norm(grad) for grad in grads.values()])
    factor = (max_norm / (torch.linalg.vector_norm(norms) + EPS)).clamp(max=1.0)
    return {name: grad * factor for name, grad in grads.items()}
