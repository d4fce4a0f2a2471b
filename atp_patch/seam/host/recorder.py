"""Recording the post-rotary queries and keys of one layer, whatever its attention implementation.

transformers looks the attention function up by the name in ``self_attn.config`` at every call. For
the one layer whose q and k are wanted, a copy of that config with our name stands in its place for
one call; the function below notes q and k, puts the host's config back, and calls the host's
function. The decoder's own config, from which masks are made, is never touched.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from atp_patch.contract.errors import UnsupportedModelError

ATTENTION_NAME = "atp_patch_record"
KEY_WEIGHT = "atp_patch_key_weight"


@dataclass
class Recording:
    """q, k and mask of one attention call: (B, H, Q, d), (B, Hk, K, d) and a host mask or None.

    ``module`` is the attention; ``rotary`` the tables (cos, sin) that its layer was handed;
    ``softcap`` and ``sinks`` what else its softmax takes (Gemma 2, gpt-oss).
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    module: Any = None
    rotary: tuple[Tensor, Tensor] | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def unrotated(self) -> tuple[Tensor, Tensor]:
        """Q and k of this pass's own tokens before rotary embedding, by turning them back.

        The host's own function is called with the angles negated, so its convention is kept
        whatever it is.

        Raises:
            UnsupportedModelError: where the host turns them in another way.
        """
        home = sys.modules[type(self.module).__module__]
        rotate = getattr(home, "apply_rotary_pos_emb", None)
        if rotate is None or self.rotary is None:
            raise UnsupportedModelError(
                f"{type(self.module).__name__} has no rotary embedding that can be turned back; "
                "score after it."
            )
        cos, sin = self.rotary
        own = self.key[:, :, -self.query.shape[2] :]
        # Tables that are scaled (long contexts) scale twice on the way there and back.
        scale = float(cos.flatten()[0].float() ** 2 + sin.flatten()[0].float() ** 2)
        query, key = rotate(self.query, own, cos, -sin)
        return query / scale, key / scale


def register() -> None:
    """Make the recording attention known to transformers (idempotent; done when a model is
    patched).
    """
    AttentionInterface.register(ATTENTION_NAME, _attend)


def arm(
    attention: Any,
    sink: Callable[[Recording], None] | None = None,
    *,
    attend: Callable[..., Any] | None = None,
    every: bool = False,
) -> None:
    """Have the next call of ``attention`` hand its q and k to ``sink``.

    Args:
        attend: the attention of every call, until :func:`release`, that brings ``KEY_WEIGHT``
            (gradient checkpointing calls again long after the forward pass).
        every: every call until :func:`release` is recorded (some vision towers attend image by
            image).
    """
    host = attention.config
    if _is_armed(host):
        host = host.__dict__["_atp_host"]
    armed = copy.copy(host)
    armed.__dict__.update(
        _attn_implementation_internal=ATTENTION_NAME,
        _atp_host=host,
        _atp_sink=sink,
        _atp_stays=attend is not None or every,
        _atp_attend=attend,
        _atp_every=every,
    )
    attention.config = armed


def overhear(attention: Any, also: Callable[[Recording], None]) -> None:
    """Have the recording that :func:`arm` asked for go to ``also`` too."""
    sink = attention.config.__dict__["_atp_sink"]

    def both(recording: Recording) -> None:
        also(recording)
        sink(recording)

    attention.config.__dict__["_atp_sink"] = both


def replay(attention: Any, recording: Recording) -> None:
    """Hand on a recording in place of the call that :func:`arm` waits for."""
    sink = attention.config.__dict__["_atp_sink"]
    disarm(attention)
    sink(recording)


def awaited(attention: Any) -> bool:
    """Whether the next call of ``attention`` is to be recorded."""
    return _is_armed(attention.config) and attention.config.__dict__["_atp_sink"] is not None


def disarm(attention: Any) -> None:
    """Undo a recording for which the call never came."""
    config = attention.config
    if _is_armed(config) and not config.__dict__["_atp_stays"]:
        attention.config = config.__dict__["_atp_host"]


def release(attention: Any) -> None:
    """Give the host's config back, whatever :func:`arm` did."""
    if _is_armed(attention.config):
        attention.config = attention.config.__dict__["_atp_host"]


def _is_armed(config: Any) -> bool:
    return "_atp_host" in getattr(config, "__dict__", {})


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> Any:
    """Hand on q and k where they are waited for, then attend as the host would, or weighted."""
    armed = module.config
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sink = armed.__dict__["_atp_sink"]
    if not armed.__dict__["_atp_every"]:
        armed.__dict__["_atp_sink"] = None  # a replay must not record again
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if sink is not None:
        found = Recording(query, key, attention_mask, scale, module, softcap=softcap, sinks=sinks)
        sink(found)
    weight = kwargs.pop(KEY_WEIGHT, None)
    if weight is not None:
        dropout = kwargs.get("dropout", 0.0)
        wanted = armed.__dict__["_atp_host"]._attn_implementation == "eager"
        return armed.__dict__["_atp_attend"](
            query,
            key,
            value,
            attention_mask,
            scale,
            weight,
            dropout,
            softcap=softcap,
            sinks=sinks,
            probabilities=wanted,
        )
    module.config = armed.__dict__["_atp_host"]
    try:
        function = ALL_ATTENTION_FUNCTIONS.get_interface(
            module.config._attn_implementation, _eager_function(module)
        )
        return function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    finally:
        if armed.__dict__["_atp_stays"]:
            module.config = armed


def _eager_function(module: Any) -> Callable[..., Any]:
    """The eager attention of the file that the attention module comes from."""
    home = sys.modules[type(module).__module__]
    function = getattr(home, "eager_attention_forward", None)
    if function is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not go through transformers' attention interface, so "
            f"its queries and keys cannot be read; use a model class of transformers >= 5.4."
        )
    return function
