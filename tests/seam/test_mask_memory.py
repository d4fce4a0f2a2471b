"""No table of all queries and keys is made for the scores of methods that read a few rows of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Lfm2Config, Lfm2ForCausalLM, LlamaConfig, LlamaForCausalLM

import atp_patch
from tests.families.kinds import TEXT

TOKENS = 20_000


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = (leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor))
        self.elements = max(self.elements, *sizes, 0)
        return made


@pytest.mark.parametrize("method", ["random", "fastv", pytest.param("atp", marks=pytest.mark.slow)])
def test_a_long_prompt_needs_no_table_of_its_own_square(method: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**{**TEXT, "num_hidden_layers": 2, "max_position_embeddings": 2**15})
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    options: dict[str, Any] = {"seed": 0} if method == "random" else {}
    atp_patch.patch_model(model, [1], method, family="generic", keep=0.01, **options)
    assert largest_tensor(model, TOKENS, side=140) < TOKENS**2 / 8
    assert atp_patch.last_trace(model).layers[1].kept_counts == (196,)


def test_nor_where_layers_that_keep_states_hear_an_earlier_one() -> None:
    """Before layer 2 the attention of layer 0 is read among the tokens that entered layer 1."""
    torch.manual_seed(0)
    types = ["full_attention", "conv", "conv"]
    small = {**TEXT, "num_hidden_layers": 3, "max_position_embeddings": 2**15}
    config = Lfm2Config(**small, layer_types=types, conv_L_cache=3, block_auto_adjust_ff_dim=False)
    model = Lfm2ForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    atp_patch.patch_model(model, [1, 2], "fastv", family="generic", keep=[0.5, 0.02])
    tokens = 3_700
    assert largest_tensor(model, tokens, side=60) < tokens**2 / 8
    layers = atp_patch.last_trace(model).layers
    assert [layers[layer].kept_counts for layer in (1, 2)] == [(1800,), (36,)]


def largest_tensor(model: Any, tokens: int, side: int) -> int:
    """The elements of the largest tensor that is made in a pass with one picture."""
    visual = torch.zeros(1, tokens, dtype=torch.bool)
    visual[:, 8 : 8 + side**2] = True
    embeds = torch.randn(1, tokens, model.config.hidden_size) * 0.1
    with torch.no_grad(), Largest() as largest:
        model(
            inputs_embeds=embeds,
            visual_mask=visual,
            visual_grids=[[(1, side, side)]],
            logits_to_keep=1,
        )
    return largest.elements
