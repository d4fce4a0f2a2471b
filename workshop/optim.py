"""The optimizer Muon in the dtype of the parameters.

``torch.optim.Muon`` takes the same step, but it iterates in bfloat16 and on one matrix at a time.
The recorded trainings iterated in float32 and on all matrices of one shape together.
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonalize(update: Tensor, steps: int = 5) -> Tensor:
    """Make matrices nearly orthogonal by a quintic Newton-Schulz iteration (Jordan, Muon, 2024).

    Args:
        update: (number, rows, columns) matrices.
        steps: number of iterations; five bring all singular values to about 0.7-1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update / (update.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Gradient descent with momentum in an orthogonalised direction.

    Matrices of one shape are handled together. The step is scaled by sqrt(max(1, rows / columns)),
    so that one learning rate can be used for all shapes.
    """

    def __init__(
        self,
        params: list[dict[str, object]],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step with the current gradients."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append((p, p.grad))
            for shape, pairs in by_shape.items():
                directions = []
                for p, gradient in pairs:
                    state = self.state[p]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].lerp_(gradient, 1 - group["momentum"])
                    directions.append(gradient.lerp(state["momentum"], group["momentum"]))
                steps = orthogonalize(torch.stack(directions))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for (p, _), step in zip(pairs, steps, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(step, alpha=-group["lr"] * scale)
