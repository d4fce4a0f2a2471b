"""The package's door methods against plain statements, on what the plain models compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import atp_patch
from tests.helpers import selection as plain
from tests.helpers.inputs import Inputs
from tests.helpers.run import forward, kept_of
from tests.seam.test_real_features import LAST_BLOCK, real
from tests.seam.vision_cases import CASES, Case, groups, read, rows_in_sequence

BY_NAME = {case.name: case for case in CASES}
MODELS = ("llava-llama", "qwen2_vl", *LAST_BLOCK)
SHARES = {"llava": 0.1}  # of 576 tokens; half of those of the others
models = pytest.mark.parametrize("name", MODELS)


@dataclass
class Picture:
    """One image or video of one sample, as the plain model sees it."""

    sample: int
    place: list[int]  # of its tokens in the sequence
    features: np.ndarray
    attention: np.ndarray
    key: np.ndarray
    relevance: np.ndarray

    @property
    def units(self) -> np.ndarray:
        """The features, of length 1."""
        return plain.units(self.features)


@dataclass
class Seen:
    """A plain model, a batch, and what it computes before its decoder runs."""

    model: Any
    inputs: Inputs
    pictures: list[Picture]
    embeds: Tensor

    @contextmanager
    def patched(self, method: Any, **options: Any) -> Iterator[Any]:
        """The same model, patched for a while."""
        try:
            yield atp_patch.patch_model(self.model, method=method, **options)
        finally:
            atp_patch.unpatch_model(self.model)

    def share_of(self, sample: int, share: float) -> list[tuple[Picture, int]]:
        """A sample's pictures, and how many tokens each keeps: its share, largest rests first."""
        mine = [picture for picture in self.pictures if picture.sample == sample]
        total = round(share * sum(len(picture.place) for picture in mine))
        exact = [total * len(p.place) / sum(len(q.place) for q in mine) for p in mine]
        counts = [int(part) for part in exact]
        for number in sorted(range(len(mine)), key=lambda i: counts[i] - exact[i]):
            counts[number] += int(sum(counts) < total)
        return list(zip(mine, counts, strict=True))


@cache
def seen(name: str) -> Seen:
    """What one of the models computes for its batch."""
    if name in LAST_BLOCK:
        one = real(name, scenes=1 if name == "llava" else 2)
        case, model, inputs = one.case, one.plain, one.inputs
    else:
        case = BY_NAME[name]
        model = case.build()
        inputs = case.feed(model, "left")
    embeds: list[Tensor] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    forward(model, inputs)
    hook.remove()
    found = pictures(case, model, inputs, embeds[0])
    for picture in found:
        picture.relevance = relevance(picture, found, model, inputs, embeds[0])
    return Seen(model, inputs, found, embeds[0])


def relevance(
    picture: Picture, every: list[Picture], model: Any, inputs: Inputs, embeds: Tensor
) -> np.ndarray:
    """The mean cosine with each word behind the sample's first visual token, from 0 to 1."""
    ids, attended = (inputs[name][picture.sample] for name in ("input_ids", "attention_mask"))
    first = min(other.place[0] for other in every if other.sample == picture.sample)
    config = model.config
    visual = {getattr(config, f"{kind}_token_id", None) for kind in ("image", "video")}
    words = [
        place
        for place, (number, real) in enumerate(zip(ids.tolist(), attended.tolist(), strict=True))
        if real and place > first and number not in visual
    ]
    text = plain.units(embeds[picture.sample, words].double().numpy())
    means = np.array([np.mean([one @ word for word in text]) for one in picture.units])
    return (means - means.min()) / (means.max() - means.min())


def pictures(case: Case, model: Any, inputs: Inputs, embeds: Tensor) -> list[Picture]:
    """Frames that follow each other without a gap are one video."""
    found: list[Picture] = []
    traced = rows_in_sequence(model, case.projector, inputs)
    for one, where in zip(read(case, model, inputs), traced, strict=True):
        for group, rows in zip(*groups(case, one), strict=True):
            at = [torch.nonzero(where == row)[0].tolist() for row in rows]
            order = np.argsort([place for _, place in at])
            sample, place = at[0][0], sorted(place for _, place in at)
            features = embeds[sample, place].double().numpy()
            attention, key = group.attention[order], group.key[order]
            made = Picture(sample, place, features, attention, key, np.empty(0))
            last = found[-1] if found else None
            if last and last.sample == sample and last.place[-1] + 1 == place[0]:
                found[-1] = Picture(
                    sample,
                    last.place + place,
                    np.concatenate([last.features, features]),
                    np.concatenate([last.attention, made.attention]),
                    np.concatenate([last.key, made.key]),
                    last.relevance,
                )
            else:
                found.append(made)
    return found


def choice(model: Any, given: Seen) -> Tensor:
    """(B, L) bool: what enters the decoder of the patched model."""
    forward(model, given.inputs)
    return kept_of(model)[0]


CHOICES: dict[str, Callable[[Picture, int], list[int]]] = {
    "fastervlm": lambda picture, count: plain.highest(picture.attention, count),
    "divprune": lambda picture, count: plain.max_min(picture.features, count),
    "scope": lambda picture, count: plain.coverage(picture.features, picture.attention, count),
    "cdpruner": lambda picture, count: plain.determinantal(
        picture.features, picture.relevance, count
    ),
    "visionzip": lambda picture, count: [*plain.zipped(picture.attention, picture.key, count)],
}


@models
@pytest.mark.parametrize("method", CHOICES)
def test_what_enters_is_what_the_paper_says(name: str, method: str) -> None:
    given, share = seen(name), SHARES.get(name, 0.5)
    with given.patched(method, keep=share) as model:
        kept = choice(model, given)
    for sample in range(len(kept)):
        for picture, count in given.share_of(sample, share):
            expected = sorted(CHOICES[method](picture, count))
            assert 0 < count < len(picture.place)
            assert kept[sample, picture.place].nonzero().flatten().tolist() == expected


@models
def test_visionzip_merges_the_others_into_its_targets(name: str) -> None:
    given, share = seen(name), SHARES.get(name, 0.5)
    entered: list[Tensor] = []
    first = given.model.get_decoder().layers[0]
    with given.patched("visionzip", keep=share) as model:
        hook = first.register_forward_pre_hook(
            lambda _, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        kept = choice(model, given)
        hook.remove()
    merges = 0
    for sample in range(len(kept)):
        expected = given.embeds[sample].double().clone()
        for picture, count in given.share_of(sample, share):
            made = plain.zipped(picture.attention, picture.key, count)
            for number, members in made.items():
                mean = picture.features[members].mean(0)
                expected[picture.place[number]] = torch.from_numpy(mean)
                merges += len(members) > 1
        wanted = expected[kept[sample]]
        torch.testing.assert_close(
            entered[0][sample, : len(wanted)].double(), wanted, rtol=1e-5, atol=1e-5
        )
    assert merges > 2


@pytest.mark.parametrize("method", CHOICES)
def test_in_front_of_atp_as_alone(method: str) -> None:
    """The first share of ``keep`` says how many enter, and ``atp`` goes on from there."""
    given = seen("qwen2_vl")
    with given.patched(method, keep=0.5) as model:
        alone = choice(model, given)
    with given.patched([method, "atp"], layers=[2, 4], keep=0.5) as model:
        assert torch.equal(choice(model, given), alone)
        layers = atp_patch.last_trace(model).layers.values()
        counts = [layer.kept_counts for layer in layers]
    assert counts[1:] == [tuple(round(n / 2) for n in before) for before in counts[:-1]]


def test_scope_without_attention_is_coverage_alone() -> None:
    given = seen("qwen2_vl")
    with given.patched("scope", alpha=0.0, keep=0.5) as model:
        kept = choice(model, given)
    for sample in range(2):
        for picture, count in given.share_of(sample, 0.5):
            alone = plain.coverage(picture.features, np.ones(len(picture.place)), count)
            stays = kept[sample, picture.place]
            assert stays.nonzero().flatten().tolist() == sorted(alone)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("scope", {"alpha": -1.0}, "alpha=-1.0 must be at least 0"),
        ("visionzip", {"dominant_share": 1.5}, "must be from 0 to 1"),
    ],
)
def test_wrong_options_are_named(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(atp_patch.ConfigError, match=message):
        atp_patch.patch_model(BY_NAME["qwen2_vl"].build(), method=method, **options)
