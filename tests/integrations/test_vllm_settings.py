"""The settings of the vLLM plugin and its choices, which need no vLLM.

`make test-vllm` runs the plugin in the real engine.
"""

from __future__ import annotations

import configparser
import importlib
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import atp_patch
from atp_patch.contract import TokenGroups, TowerTokens
from atp_patch.contract.errors import ConfigError, InputError, UnsupportedModelError
from atp_patch.integrations.vllm.baselines import BaselineAtDoor
from atp_patch.integrations.vllm.choosing import keep_features, merge_features, tile_counts
from atp_patch.integrations.vllm.picture import Picture
from atp_patch.integrations.vllm.plugin import SERVED, check_engine, check_model, register
from atp_patch.integrations.vllm.positions import prompt_positions, split_steps, with_steps
from atp_patch.integrations.vllm.settings import SERVED_METHODS, VARIABLE, Settings
from atp_patch.methods import METHODS, DivPrune, VisionZip
from atp_patch.tools.arguments import named_values
from tests.families.anyres import KINDS as ANYRES
from tests.families.kinds import Kind, Words, make, sample
from tests.families.kinds import Picture as Shown
from tests.families.square import KINDS as SQUARE
from tests.helpers import inputs as prompts
from tests.helpers.inputs import batch
from tests.helpers.run import forward
from tests.helpers.tiny import decoder_layers, tiny_model

WRONG = {
    "keep=0.5": "names no method",
    "divprune": "is not one name=value",
    "method=divprune": "give one of keep",
    "method=divprune,keep=0.5,tokens_per_image=9": "give one of keep",
    "method=divprune,keep=0.5,keep=0.5": "is not one name=value",
    "method=divprune,keep=0": "must be above 0",
    "method=divprune,keep=much": "give a number",
    "method=divprune,tokens_per_image=0": "must be at least 1",
    "method=divprune,tokens_per_image=1.5": "give a whole number",
    "method=divprune,keep=0.5,alpha=1": "has no option alpha",
    "method=divprune,keep=0.5,share=0.5": "leave out share",
    "method=scope,alpha=-1,keep=0.5": "alpha=-1 must be at least 0",
    "method=nothing,keep=0.5": "unknown method 'nothing'",
    "method=random,keep=0.5,seed=first": "give a whole number",
    "method=cdpruner,keep=0.5": "it reads the question",
    "method=downsample,keep=0.5": "vLLM itself shrinks pictures",
    "method=voco,keep=0.5": "cannot be served",
}
INSIDE = sorted({cls.name for cls in METHODS if cls.where == "layer"} - {"random", "uniform"})


def test_values_are_read_as_those_of_commands_are() -> None:
    deep = "[" * 100_000
    with pytest.raises(ConfigError, match="give a number"):
        Settings.parse(f"method=divprune,keep={deep}")
    assert named_values(["a=True", " b = False ", "c=1e-1", f"d={deep}"]) == {
        "a": True,
        "b": False,
        "c": 0.1,
        "d": deep,
    }
    for empty in ("keep=", "=0.5", "keep"):
        with pytest.raises(ConfigError, match="is not one name=value"):
            Settings.parse(f"method=divprune,{empty}")


@pytest.mark.parametrize(("text", "said"), WRONG.items())
def test_a_wrong_setting_is_one_line_that_names_the_variable(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        Settings.parse(text)
    message = str(error.value)
    assert said in message
    assert message.startswith(VARIABLE)
    assert "\n" not in message


@pytest.mark.parametrize("name", INSIDE)
def test_a_method_inside_the_decoder_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} cannot be served .* inside the decoder"):
        Settings.parse(f"method={name},keep=0.5")


def test_a_method_that_decides_the_number_itself_is_refused() -> None:
    @dataclass(frozen=True)
    class Adaptive(atp_patch.DoorMethod):
        name = "test-adaptive"
        summary = "as many as it likes"

        @property
        def takes_budget(self) -> bool:
            return False

        def decide(self, view: atp_patch.DoorView) -> atp_patch.Decision:
            return atp_patch.Decision(view.slot_valid)

    with pytest.raises(ConfigError, match="decides itself how many"):
        Settings.parse(f"method={Adaptive.name},keep=0.5")


def test_every_other_method_is_served() -> None:
    refused = {*INSIDE, "cdpruner", "downsample", "voco"}
    served = [cls.name for cls in METHODS if cls.name not in refused]
    made = [Settings.parse(f"method={name},keep=0.5").method for name in served]
    assert len(made) == len(served) == 11
    assert served == sorted(SERVED_METHODS.split(", "), key=served.index)


def test_options_of_the_method_are_read() -> None:
    found = Settings.parse(" method = scope , keep = 0.25 , alpha = 0 ")
    assert found.method == atp_patch.methods.SCOPE(alpha=0)
    assert not found.reads_tower
    assert Settings.parse("method=scope,keep=0.25").reads_tower
    assert Settings.parse("method=prumerge+,keep=0.25").reads_tower


@pytest.mark.parametrize(
    ("budget", "counts"),
    {
        "keep=0.25": {1: 1, 2: 1, 9: 2, 576: 144, 577: 144},
        "keep=1": {1: 1, 576: 576},
        "tokens_per_image=64": {1: 1, 63: 63, 64: 64, 576: 64},
    }.items(),
)
def test_the_count_follows_from_the_size(budget: str, counts: dict[int, int]) -> None:
    settings = Settings.parse(f"method=divprune,{budget}")
    assert {total: settings.count(total) for total in counts} == counts


# -- the choice is that of patch_model -------------------------------------------------------------


@dataclass(frozen=True)
class SeenDivPrune(DivPrune):
    """DivPrune that stores what it sees."""

    name = "test-seen-divprune"

    def decide(self, view: atp_patch.DoorView) -> atp_patch.Decision:
        VIEWS.append(view)
        return super().decide(view)


@dataclass(frozen=True)
class SeenVisionZip(VisionZip):
    """VisionZip that stores what it sees."""

    name = "test-seen-visionzip"

    def decide(self, view: atp_patch.DoorView) -> atp_patch.Decision:
        VIEWS.append(view)
        return super().decide(view)


@dataclass(frozen=True)
class SeenBaseline(BaselineAtDoor):
    """A baseline that stores what it sees."""

    name = "test-seen-baseline"

    def decide(self, view: atp_patch.DoorView) -> atp_patch.Decision:
        VIEWS.append(view)
        return super().decide(view)


VIEWS: list[atp_patch.DoorView] = []
SAME = {
    "divprune": (SeenDivPrune(), DivPrune()),
    "visionzip": (SeenVisionZip(), VisionZip()),
    "uniform": (SeenBaseline(baseline="uniform"), BaselineAtDoor(baseline="uniform")),
    "random": (
        SeenBaseline(baseline="random", settings={"seed": 3}),
        BaselineAtDoor(baseline="random", settings={"seed": 3}),
    ),
}


@pytest.mark.parametrize("kind", ["llava-llama", "qwen2_vl"])
@pytest.mark.parametrize("case", SAME)
def test_choice_and_features_are_those_of_the_door(kind: str, case: str) -> None:
    seen, method = SAME[case]
    model = atp_patch.patch_model(tiny_model(kind), method=seen, keep=0.25)
    entered: list[Tensor] = []
    decoder_layers(model)[0].register_forward_pre_hook(
        lambda module, args: entered.append(args[0].clone())
    )
    VIEWS.clear()
    inputs = batch(model, prompts.SAME_SIZE, "left")
    forward(model, inputs)
    (view,), (hidden,) = VIEWS, entered
    kept = atp_patch.last_trace(model).layers[0].kept
    (grid,) = view.layout.grids[0]
    pictures = [Picture.tiled(1, grid.height, grid.width)] * 2
    tower = {
        number: TowerTokens(tokens.attention, tokens.key, tokens.class_token)
        for number, tokens in view.tower.items()
    }
    found = keep_features(Settings(method, keep=0.25), list(view.features), pictures, tower)
    for b, one in enumerate(found):
        places = view.layout.position[b]
        assert torch.equal(places[one.place], places[kept[b, places]])
        start = int(places[0])  # text stands before the picture, with padding on the left
        assert torch.equal(one.features, hidden[b, start : start + len(one.place)])
    alone = [
        keep_features(Settings(method, keep=0.25), [one], pictures[:1], _of(tower, b))[0]
        for b, one in enumerate(view.features)
    ]
    for one, other in zip(alone, found, strict=True):
        assert torch.equal(one.place, other.place)


def _of(tower: dict[float, TowerTokens], b: int) -> dict[float, TowerTokens]:
    return {
        number: TowerTokens(tokens.attention[b : b + 1], tokens.key[b : b + 1], None)
        for number, tokens in tower.items()
    }


TILED = {
    kind.name: kind for kind in (*SQUARE, *ANYRES) if kind.name in ("internvl", "llava_onevision")
}


def entering(model: Any, inputs: Any) -> Tensor:
    """(L, D) what enters the decoder's first layer of one sample's forward pass."""
    entered: list[Tensor] = []
    handle = decoder_layers(model)[0].register_forward_pre_hook(
        lambda module, args: entered.append(args[0][0].clone())
    )
    forward(model, inputs)
    handle.remove()
    return entered[0]


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        (TILED["internvl"], "divprune"),
        (TILED["internvl"], "visionzip"),
        (TILED["internvl"], "uniform"),
        (TILED["llava_onevision"], "divprune"),
        (TILED["llava_onevision"], "uniform"),
    ],
    ids=lambda one: one if isinstance(one, str) else one.name,
)
def test_choice_and_features_of_tiles_are_those_of_the_door(kind: Kind, case: str) -> None:
    """The marks that end rows in LLaVA-OneVision stay, and each tile keeps its share."""
    seen, method = SAME[case]
    inputs = make(kind, (sample(Words(3), Shown(1), Words(5), seed=3),)).inputs
    features = entering(kind.build(), inputs)
    model = atp_patch.patch_model(kind.build(), method=seen, keep=0.25)
    VIEWS.clear()
    left = entering(model, inputs)
    (view,), kept = VIEWS, atp_patch.last_trace(model).layers[0].kept[0]
    shown = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    start, stop = int(shown[0]), int(shown[-1]) + 1
    assert stop - start == len(shown)
    grids = tuple(replace(grid, start=grid.start - start) for grid in view.layout.grids[0])
    assert len(grids) > 1
    picture = Picture(len(shown), grids)
    # Another picture stands before it, as in a batch of vLLM.
    (other, found) = keep_features(
        Settings(method, keep=0.25),
        [features[start : start + grids[0].length], features[start:stop]],
        [Picture(grids[0].length, grids[:1]), picture],
        {n: behind_its_first_tile(grids[0].length, tokens) for n, tokens in view.tower.items()},
    )
    assert len(other.place) == round(grids[0].length / 4)
    assert found.place.tolist() == kept[start:stop].nonzero()[:, 0].tolist()
    assert torch.equal(found.features, left[start : start + len(found.place)])


def behind_its_first_tile(length: int, tokens: TowerTokens) -> TowerTokens:
    """What the tower saw of two pictures: the first tile of one alone, and all of that one."""

    def both(table: Tensor) -> Tensor:
        first = table.clone()
        first[:, length:] = 0
        return torch.cat([first, table])

    assert tokens.class_token is not None
    return TowerTokens(both(tokens.attention), both(tokens.key), both(tokens.class_token))


def test_pictures_of_several_sizes_choose_as_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = [Picture.tiled(1, 4, 6), Picture.tiled(2, 6, 8), Picture.tiled(1, 4, 6)]
    features = [torch.randn(one.length, 16, generator=generator) for one in pictures]
    settings = Settings.parse("method=divprune,keep=0.3")
    together = keep_features(settings, features, pictures)
    for one, features_of_one, picture in zip(together, features, pictures, strict=True):
        (alone,) = keep_features(settings, [features_of_one], [picture])
        assert torch.equal(one.place, alone.place)
        assert len(one.place) == settings.count(picture.length)
        assert torch.equal(one.features, features_of_one[one.place])


@pytest.mark.parametrize("budget", ["keep=0.3", "tokens_per_image=2"])
def test_a_tower_method_merges_within_each_tile(budget: str) -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = [Picture.tiled(1, 3, 4), Picture.tiled(3, 3, 4)]
    settings = Settings.parse(f"method=prumerge+,{budget}")
    counts = tile_counts(settings, pictures)
    token = torch.arange(12).expand(4, -1)
    drawn = torch.rand(4, 12, 20, generator=generator)

    def groups(tiles: slice) -> TokenGroups:
        number = len(token[tiles])
        return TokenGroups(
            attention=drawn[tiles, :, 0],
            key=drawn[tiles, :, 1:9],
            valid=torch.ones(number, 12, dtype=torch.bool),
            row=token[tiles] // 4,
            column=token[tiles] % 4,
            heights=[3] * number,
            widths=[4] * number,
            counts=counts[tiles],
            minimum=0,
        )

    features = drawn[:, :, 9:]
    found = merge_features(settings, groups(slice(None)), features, pictures)
    assert [len(one.place) for one in found] == [settings.count(12), settings.count(36)]
    single = [
        merge_features(settings, groups(tile), features[tile], [Picture.tiled(1, 3, 4)])[0]
        for tile in (slice(number, number + 1) for number in range(4))
    ]
    for one, tiles in zip(found, (single[:1], single[1:]), strict=True):
        places = [12 * number + tile.place for number, tile in enumerate(tiles)]
        assert torch.equal(one.place, torch.cat(places))
        torch.testing.assert_close(one.features, torch.cat([tile.features for tile in tiles]))


def test_a_budget_of_all_tokens_changes_nothing() -> None:
    features = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    (kept,) = keep_features(
        Settings.parse("method=visionzip,keep=1"), [features], [Picture.tiled(1, 3, 4)]
    )
    assert torch.equal(kept.features, features)
    assert kept.place.tolist() == list(range(12))


def test_channels_that_the_method_does_not_see_go_along() -> None:
    features = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    behind = torch.arange(12.0)[:, None]
    settings, picture = Settings.parse("method=divprune,keep=0.5"), [Picture.tiled(1, 3, 4)]
    (alone,) = keep_features(settings, [features], picture)
    (kept,) = keep_features(settings, [torch.cat([features, behind], 1)], picture, width=8)
    assert torch.equal(kept.place, alone.place)
    assert torch.equal(kept.features[:, :8], alone.features)
    assert kept.features[:, 8].tolist() == kept.place.tolist()


def test_broken_features_are_reported() -> None:
    features = torch.ones(12, 8)
    features[3, 2] = torch.nan
    with pytest.raises(InputError, match="NaN or infinite"):
        keep_features(
            Settings.parse("method=divprune,keep=0.5"), [features], [Picture.tiled(1, 3, 4)]
        )


# -- positions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_travel_with_features(dtype: torch.dtype) -> None:
    features = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    steps = torch.tensor(
        [[0, 1, 2], [255, 256, 257], [575, 576, 1023], [65535, 0, 4096], [9, 9, 9]]
    )
    found, places = split_steps(with_steps(features, steps))
    assert torch.equal(found, features)
    assert torch.equal(places, steps)


def test_positions_are_those_of_the_whole_prompt() -> None:
    """Two pictures of 9 and 4 tokens, of which 2 and 3 stay, in a prompt of 17 tokens."""
    whole = list(range(17))  # 2 words, picture, 1 word, picture, 1 word
    text = [*whole[:2], whole[11], whole[16]]
    positions, following = prompt_positions(9, [(2, 2, 9), (5, 3, 4)])
    assert positions.shape == (3, 9)
    for row in positions.tolist():
        assert [row[0], row[1], row[4], row[8]] == text
        assert row[2:4] == [2, 2]
        assert row[5:8] == [12, 12, 12]
    assert following == 17 - 9


# -- the plugin ------------------------------------------------------------------------------------


def test_the_entry_point_names_the_function() -> None:
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    points = dict(
        line.split(" = ")
        for line in setup["options.entry_points"]["vllm.general_plugins"].strip().splitlines()
    )
    module, _, name = points["atp_patch"].partition(":")
    assert getattr(importlib.import_module(module), name) is register


@pytest.mark.parametrize("text", ["", "method=fastv,keep=0.5"])
def test_without_a_setting_nothing_is_done_and_a_wrong_one_ends_the_process(text: str) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from atp_patch.integrations.vllm.plugin import register\nregister()",
        ],
        env={**os.environ, VARIABLE: text},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (1 if text else 0)
    assert len(done.stderr.splitlines()) == (1 if text else 0), done.stderr
    assert ("atp_patch: ATP_PATCH_VLLM: method=fastv cannot be served" in done.stderr) == bool(text)


def model_config(name: str = "LlavaForConditionalGeneration", **given: Any) -> Any:
    facts = {
        "model_type": "llava",
        "vision_config": SimpleNamespace(model_type=given.pop("tower", "clip_vision_model")),
        "vision_feature_select_strategy": given.pop("select", "default"),
    }
    if name.startswith("LlavaOnevision"):
        facts["model_type"] = "llava_onevision"
    elif not name.startswith("Llava"):
        facts["model_type"] = "another"
    multimodal = SimpleNamespace(
        enable_mm_embeds=given.pop("embeds", False), video_pruning_rate=given.pop("videos", None)
    )
    return SimpleNamespace(
        hf_config=SimpleNamespace(**facts), architecture=name, multimodal_config=multimodal
    )


@pytest.mark.parametrize(
    ("method", "config", "said"),
    [
        ("divprune", model_config("Idefics3ForConditionalGeneration"), "cannot be pruned in vLLM"),
        ("visionzip", model_config("Qwen2VLForConditionalGeneration"), "reads the vision tower"),
        (
            "visionzip",
            model_config("LlavaOnevisionForConditionalGeneration", tower="siglip_vision_model"),
            "reads the vision tower",
        ),
        (
            "divprune",
            model_config("LlavaOnevisionForConditionalGeneration", select="full"),
            "class token",
        ),
        ("divprune", model_config(tower="pixtral"), "no squares"),
        ("divprune", model_config(select="full"), "class token"),
        ("divprune", model_config(embeds=True), "--enable-mm-embeds"),
        ("divprune", model_config(videos=0.5), "--video-pruning-rate"),
    ],
)
def test_a_model_that_cannot_be_pruned_is_refused(method: str, config: Any, said: str) -> None:
    settings = Settings.parse(f"method={method},keep=0.5")
    with pytest.raises((ConfigError, UnsupportedModelError), match=said):
        check_model(config, settings, SERVED.get(config.architecture))


def test_a_model_that_can_be_pruned_is_served() -> None:
    for method in ("divprune", "visionzip", "prumerge+", "random"):
        settings = Settings.parse(f"method={method},keep=0.5")
        check_model(model_config(), settings, SERVED["LlavaForConditionalGeneration"])


@pytest.mark.parametrize(
    ("argument", "change"),
    {
        "--pipeline-parallel-size": {"pipeline_parallel_size": 2},
        "--enable-dbo": {"enable_dbo": True},
        "--tensor-parallel-size": {"tensor_parallel_size": 2},
        "--speculative-config": {},
    }.items(),
)
def test_engines_in_which_positions_would_be_wrong_are_refused(
    argument: str, change: dict[str, Any]
) -> None:
    parallel = {"pipeline_parallel_size": 1, "enable_dbo": False, "tensor_parallel_size": 1}
    settings = Settings.parse("method=visionzip,keep=0.5")

    def engine(**changes: Any) -> Any:
        speculative = (
            object() if argument == "--speculative-config" and changes != parallel else None
        )
        return SimpleNamespace(
            parallel_config=SimpleNamespace(**{**parallel, **changes}),
            speculative_config=speculative,
        )

    check_engine(engine(**parallel), settings)
    with pytest.raises(ConfigError, match=argument):
        check_engine(engine(**change), settings)
