"""Views of tiny and built-in models' passes, to ask methods what they choose on other features."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import atp_patch
from atp_patch.builtin import load_builtin, make_scene, prompt
from atp_patch.methods.base import keep_best
from tests.helpers import inputs as prompts
from tests.helpers.inputs import batch
from tests.helpers.run import forward
from tests.helpers.tiny import tiny_model


@dataclass(frozen=True)
class SeesLayer(atp_patch.LayerMethod):
    """Keeps the first tokens, and remembers the views that it got in a list of the test's own."""

    name = "sees-layer"
    summary = "the first tokens"
    views: Any = None

    def decide(self, view: atp_patch.View, module: object) -> atp_patch.Decision:
        self.views.append(view)
        return atp_patch.Decision(keep_best(view, -view.token.float()))


@dataclass(frozen=True)
class SeesDoor(atp_patch.DoorMethod):
    """Keeps the first tokens, and remembers the views that it got in a list of the test's own."""

    name = "sees-door"
    summary = "the first tokens"
    views: Any = None
    blocks: Any = ()
    queries: str = "class"

    @property
    def tower_blocks(self) -> tuple[float, ...]:
        return tuple(self.blocks)

    @property
    def tower_queries(self) -> str:
        return self.queries

    def decide(self, view: atp_patch.DoorView) -> atp_patch.Decision:
        self.views.append(view)
        return atp_patch.Decision(keep_best(view, -view.token.float()))


def asked_of(name: str) -> tuple[Any, Any]:
    """A model and inputs: a tiny model by kind, with samples of several images, one image and none;
    or a built-in model, "llava" or "dynamic", with two scenes.
    """
    if name in ("llava", "dynamic"):
        model, processor = load_builtin(name)
        questions = ["what colour is the sign ?", "how many stars are there ?"]
        inputs = processor(
            images=[make_scene("test", number).image for number in range(2)],
            text=[prompt(question, name) for question in questions],
            return_tensors="pt",
            padding=True,
        )
        return model, inputs
    model = tiny_model(name)
    return model, batch(model, prompts.MIXED)


@cache
def layer_view(name: str, keep: float, layer: int = 2, **options: Any) -> atp_patch.View:
    """What a layer method sees before one layer."""
    model, inputs = asked_of(name)
    views: list[Any] = []
    atp_patch.patch_model(model, [layer], SeesLayer(views), keep=keep, **options)
    forward(model, inputs)
    return views[0]  # type: ignore[no-any-return]


@cache
def door_view(
    name: str,
    keep: float,
    blocks: tuple[float, ...] = (),
    queries: str = "class",
    **options: Any,
) -> atp_patch.DoorView:
    """What a door method sees that asks for some blocks of the tower."""
    model, inputs = asked_of(name)
    views: list[Any] = []
    method = SeesDoor(views=views, blocks=blocks, queries=queries)
    atp_patch.patch_model(model, method=method, keep=keep, **options)
    forward(model, inputs)
    return views[0]  # type: ignore[no-any-return]
