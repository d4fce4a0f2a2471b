"""Optimizers of bfloat16 weights, which keep float32 copies of them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Change the dtype of the parameters, but not of buffers such as the rotary frequencies."""
    for p in module.parameters():
        p.data = p.data.to(dtype)


class Masters:
    """Muon for the named matrices and Adam for all other parameters that are trained.

    Args:
        module: its parameters in any dtype; those that need no gradient are left as they are.
        matrices: names of the parameters for Muon.
        muon_rate, adam_rate: learning rates.
        rates: factors of the learning rate by the beginning of a parameter's name; 1 by default.
        clip: largest norm of the gradient.
    """

    def __init__(
        self,
        module: nn.Module,
        matrices: Collection[str],
        muon_rate: float,
        adam_rate: float,
        rates: dict[str, float] | None = None,
        clip: float = 5.0,
    ) -> None:
        self._clip = clip
        self.weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.copies = {
            name: nn.Parameter(p.detach().float().clone()) for name, p in self.weights.items()
        }
        groups: dict[tuple[bool, float], list[Tensor]] = {}
        for name, copy in self.copies.items():
            shares = [share for start, share in (rates or {}).items() if name.startswith(start)]
            groups.setdefault((name in matrices, shares[0] if shares else 1.0), []).append(copy)
        muon, adam = (
            [
                {"params": params, "lr": rate * share, "top_lr": rate * share}
                for (is_matrix, share), params in groups.items()
                if is_matrix == wanted
            ]
            for wanted, rate in ((True, muon_rate), (False, adam_rate))
        )
        self.optimizers: list[torch.optim.Optimizer] = []
        if muon:
            self.optimizers.append(torch.optim.Muon(muon, weight_decay=0.0))
        if adam:
            self.optimizers.append(torch.optim.Adam(adam, betas=(0.9, 0.98)))

    def step(self, rate_share: float) -> float:
        """Take a step with the module's gradients, clear them, and return their norm.

        Args:
            rate_share: factor of all learning rates.
        """
        for name, p in self.weights.items():
            self.copies[name].grad = None if p.grad is None else p.grad.float()
            p.grad = None
        norm = float(nn.utils.clip_grad_norm_(self.copies.values(), self._clip))
        if norm == norm:  # A step with a gradient that is not a number would destroy the weights.
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["top_lr"] * rate_share
                optimizer.step()
        with torch.no_grad():
            for name, p in self.weights.items():
                p.copy_(self.copies[name])
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Return the float32 weights and the optimizers' states by name."""
        found = {name: copy.detach() for name, copy in self.copies.items()}
        names = {id(copy): name for name, copy in self.copies.items()}
        for optimizer in self.optimizers:
            for p, state in optimizer.state.items():
                for key, value in state.items():
                    found[f"state.{key}.{names[id(p)]}"] = torch.as_tensor(value)
        return {name: value.contiguous() for name, value in found.items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` returned; a parameter that is missing there stays as it is."""
        states: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("state."):
                _, key, of = name.split(".", 2)
                states.setdefault(of, {})[key] = value
            elif name in self.copies:
                self.copies[name].copy_(value)
                self.weights[name].copy_(value)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    name = next(n for n, copy in self.copies.items() if copy is p)
                    if name in states:
                        optimizer.state[p] = states[name]
