"""Averages over the forward passes between two lines of progress."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor
from torch.nn.functional import nll_loss

from atp_patch.patching.trace import PruningTrace


class Meter:
    """Sums up what the forward passes of this process gave."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, float] = defaultdict(float)

    def add(
        self,
        log_prob: Tensor,
        target: Tensor,
        answer: Tensor,
        trace: PruningTrace | None,
        divergence: Tensor | None,
    ) -> None:
        """Add one forward pass to the sums.

        Args:
            log_prob: (N, vocabulary) log-probabilities of the answers' tokens.
            target: (N,) the true ids of these tokens.
            answer: (B, L - 1) bool, which is true where these tokens stand.
            trace: what was pruned; None for a batch without images.
            divergence: () KL divergence from the plain model, summed over the answers' tokens;
                None where nothing is distilled.
        """
        right = log_prob.argmax(-1) == target
        wrong = answer.clone()
        wrong[answer] = ~right
        tokens, batch = target.numel(), answer.shape[0]
        self._note("next_token", float(nll_loss(log_prob, target, reduction="sum")), tokens)
        self._note("token_accuracy", float(right.sum()), tokens)
        self._note("answer_accuracy", float((~wrong.any(1)).sum()), batch)
        if divergence is not None:
            self._note("distill", float(divergence.detach()), tokens)
        if trace is not None:
            seen = sum(total > 0 for total in trace.layout.totals)
            self._note("average_tokens", trace.average_tokens * seen, seen)
            self._note("visual_tokens", trace.visual_tokens * seen, seen)
            for name, value in trace.losses.items():
                self._note(name, value * seen, seen)

    def _note(self, name: str, total: float, count: float) -> None:
        self._sums[name] += total
        self._counts[name] += count

    def take(self) -> dict[str, float]:
        """Give the averages by name, and begin new sums.

        An answer counts as right if each of its tokens is the likeliest.
        """
        found = {n: self._sums[n] / self._counts[n] for n in self._sums if self._counts[n]}
        self._sums.clear()
        self._counts.clear()
        return found
