"""What the page shows of a pruned pass, as HTML: kept tokens, scores, costs."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from atp_patch.contract.errors import InputError
from atp_patch.patching.trace import PruningTrace
from atp_patch.visualize import Drawing, depth_plot, heat_map, overlay
from atp_patch.visualize.palette import COLOURS
from atp_patch.web.engine import Reply

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#999999", *COLOURS[:2])  # plain, the first method, the second one
_MEGA, _GIGA = 1e6, 1e9


@dataclass(frozen=True)
class Costs:
    """What one way of running the model costs.

    Attributes:
        tokens: visual tokens, averaged over all decoder layers.
        gflops: GFLOPs of the decoder's prefill.
        kv_mb: megabytes of the key/value cache after the prefill.
        prefill_ms: milliseconds up to the first token; None where nothing was answered.
        token_ms: milliseconds for each token after it; None where there was only one.
    """

    tokens: float
    gflops: float
    kv_mb: float
    prefill_ms: float | None = None
    token_ms: float | None = None

    @classmethod
    def plain(cls, trace: PruningTrace, reply: Reply | None = None) -> Costs:
        """Return the costs of the plain model on the same prompt, and the times of its answer."""
        sizes = trace.visual_tokens, trace.flops_plain / _GIGA, trace.kv_bytes_plain / _MEGA
        return cls(*sizes, *_times(reply))

    @classmethod
    def pruned(cls, trace: PruningTrace, reply: Reply | None = None) -> Costs:
        """Return the costs of the pruned model, and the times of its answer."""
        sizes = trace.average_tokens, trace.flops / _GIGA, trace.kv_bytes / _MEGA
        return cls(*sizes, *_times(reply))


def kept(traces: Mapping[str, PruningTrace]) -> str:
    """Return the picture under each pruning layer, in two colours where two scores decide."""
    return "".join(
        _figure(
            overlay(trace, by_score=_has_two_scores(trace)),
            f"The visual tokens that {name} keeps at each pruning layer",
            name,
        )
        for name, trace in traces.items()
    )


def scores(traces: Mapping[str, PruningTrace]) -> str:
    """Return a heat map of each method's scores, or a sentence where it has none."""
    parts = []
    for name, trace in traces.items():
        try:
            drawing = heat_map(trace)
        except InputError:
            parts.append(f"<h3>{escape(name)}</h3><p>This method gives tokens no scores.</p>")
            continue
        parts.append(_figure(drawing, f"The score of each visual token by {name}", name))
    return "".join(parts)


def costs(found: Mapping[str, Costs], traces: Mapping[str, PruningTrace]) -> str:
    """Return small charts of what each way of running the model costs, and tokens by layer."""
    bars = _figure(_bars(found), "Costs of the plain and the pruned model: " + _spoken(found))
    depth = _figure(depth_plot(traces), "Visual tokens that enter each decoder layer")
    note = "<p>Times are those of this one answer, and vary from one to the next.</p>"
    return bars + (note if any(each.prefill_ms for each in found.values()) else "") + depth


def _bars(found: Mapping[str, Costs]) -> Drawing:
    from matplotlib.figure import Figure

    told: dict[str, list[float | None]] = {
        "visual tokens, mean over layers": [each.tokens for each in found.values()],
        "decoder prefill, GFLOPs": [each.gflops for each in found.values()],
        "key/value cache, MB": [each.kv_mb for each in found.values()],
        "time to first token, ms": [each.prefill_ms for each in found.values()],
        "each token after it, ms": [each.token_ms for each in found.values()],
    }
    known = {title: values for title, values in told.items() if None not in values}
    height = 0.5 + 0.28 * len(found)
    figure = Figure(figsize=(2 * len(known), height), layout="constrained")
    for ax, (title, values) in zip(figure.subplots(1, len(known)), known.items(), strict=True):
        _bar(ax, title, list(found), values)
    return Drawing(figure)


def _bar(ax: Axes, title: str, names: list[str], values: list[Any]) -> None:
    drawn = ax.barh(names, values, color=_COLOURS[: len(names)])
    ax.bar_label(drawn, fmt="%.3g", padding=2, fontsize=8)
    ax.invert_yaxis()
    ax.set_title(title, fontsize=9)
    ax.set_xlim(0, 1.25 * max(values))
    ax.tick_params(labelsize=8, length=0, labelbottom=False)
    ax.spines[:].set_visible(False)


def _has_two_scores(trace: PruningTrace) -> bool:
    return bool(trace.layers) and all(
        len(layer_trace.thresholds) == 2 for layer_trace in trace.layers.values()
    )


def _times(reply: Reply | None) -> tuple[float | None, float | None]:
    return (None, None) if reply is None else (reply.prefill_ms, reply.token_ms)


def _spoken(found: Mapping[str, Costs]) -> str:
    return "; ".join(
        f"{name} {each.tokens:.0f} visual tokens, {each.gflops:.2f} GFLOPs, {each.kv_mb:.2f} MB"
        for name, each in found.items()
    )


def _figure(drawing: Drawing, alt: str, title: str | None = None) -> str:
    """Return a drawing as an image inside the page, with its heading."""
    data = b64encode(drawing.png()).decode("ascii")
    heading = "" if title is None else f"<h3>{escape(title)}</h3>"
    image = f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}" style="max-width: 100%">'
    return heading + image
