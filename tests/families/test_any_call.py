"""Any prompt of any family with any method and budget: the promises hold, or it is refused by name.

An ordinary run tries a few dozen calls, always the same ones. ``make fuzz CASES=100000`` tries as
many others as it is told; the seed is printed, and a failing call is made smaller and shown.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor

import atp_patch
from tests.families.hosts import skip_where_samples_share_places
from tests.families.kinds import VIDEO, Kind, Picture, Sample, Words, make
from tests.families.tables import EVERY
from tests.families.test_every_family import placed
from tests.helpers.compare import assert_close
from tests.helpers.doors import Asked
from tests.helpers.inputs import extended, real_mask
from tests.helpers.oracle import masked_logits
from tests.helpers.run import forward, generate, kept_of, new_ids

CASES = os.environ.get("ATP_PATCH_CASES")
SETTINGS = settings(
    max_examples=40 if CASES is None else int(CASES),
    derandomize=CASES is None,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
# No picture is all zeros: some hosts take that for padding.
PAINTS: dict[str, Any] = {
    "noise": None,
    "one colour": lambda height, width: torch.full((3, height, width), 0.3),
    "one spike": lambda height, width: torch.full((3, height, width), 0.1).index_put_(
        (torch.tensor(0), torch.tensor(0), torch.tensor(0)), torch.tensor(9.0)
    ),
}
LAYER_METHODS = ("fastv", "atp", "fixed", "random", "uniform", "pyramiddrop", "dart")
BUDGETS = st.one_of(
    st.fixed_dictionaries({"keep": st.sampled_from([0.01, 0.1, 0.3, 0.5, 0.9, 0.999, 1.0])}),
    st.fixed_dictionaries({"target_tokens": st.integers(15, 60)}),
    st.fixed_dictionaries({"target_share": st.floats(0.3, 1.0)}),
)


@st.composite
def samples_of(draw: st.DrawFn, kind: Kind) -> list[Sample]:
    """One to four prompts of words and pictures; at least one has a picture."""
    pictures = [Picture(which) for which in range(VIDEO)]
    if kind.videos and draw(st.booleans()):
        films = [Picture(VIDEO)]
        pictures = [*pictures, *films] if kind.mixes else films
    piece = st.one_of(st.builds(Words, st.integers(1, 8)), st.sampled_from(pictures))
    found = []
    for number in range(draw(st.integers(1, 4))):
        pieces = draw(st.lists(piece, max_size=4))
        if number == 0 and not any(isinstance(one, Picture) for one in pieces):
            pieces = [*pieces, draw(st.sampled_from(pictures))]
        # Hosts differ in what they make of a prompt that ends in a picture, so words follow.
        found.append(Sample((*pieces, Words(draw(st.integers(1, 5)))), draw(st.integers(0, 99))))
    return found


@st.composite
def patches(draw: st.DrawFn, kind: Kind) -> dict[str, Any]:
    """Arguments of ``patch_model`` whose outcome the oracle knows."""
    given: dict[str, Any] = dict(draw(BUDGETS))
    door = Asked(merges=False)
    given["method"] = draw(
        st.one_of(
            st.sampled_from(LAYER_METHODS),
            st.just(door),
            st.sampled_from(LAYER_METHODS).map(lambda name: [door, name]),
        )
    )
    if given["method"] is not door:
        prunable = st.integers(1, kind.last_layer)
        given["layers"] = draw(st.lists(prunable, min_size=1, max_size=3, unique=True).map(sorted))
    given["min_tokens"] = draw(st.sampled_from([1, 1, 1, 3, 200]))
    given["min_tokens_per_image"] = draw(st.sampled_from([0, 0, 2]))
    return given


@SETTINGS
@given(data=st.data(), kind=st.sampled_from(EVERY), padding=st.sampled_from(["left", "right"]))
def test_the_promises_hold_or_it_is_refused(data: st.DataObject, kind: Kind, padding: str) -> None:
    samples = data.draw(samples_of(kind), label="samples")
    options = data.draw(patches(kind), label="patch")
    paint = PAINTS[data.draw(st.sampled_from(sorted(PAINTS)), label="pictures")]
    batch = make(kind, samples, padding, paint)
    plain, inputs = kind.build(), batch.inputs
    try:
        model = atp_patch.patch_model(kind.build(), **options)
        logits = forward(model, inputs).logits
    except atp_patch.ATPError as error:
        event(f"refused: {type(error).__name__}")
        return
    kept, places, real = kept_of(model), placed(batch), real_mask(inputs)
    check_kept(kept, places, real, options)
    last = kept[max(kept)]
    assert_close(logits, masked_logits(plain, inputs, kept, **kind.seen(inputs)), last)
    event("nothing went" if bool(last[real].all()) else "pruned")
    if padding == "left" and plain.config.model_type != "ernie4_5_vl_moe":
        check_steps(kind, model, plain, inputs, kept)
    check_alone(kind, model, samples, paint, logits, kept, real)


def check_kept(
    kept: dict[int, Tensor], places: Tensor, real: Tensor, options: dict[str, Any]
) -> None:
    """Text stays, padding goes, nothing comes back, and as many stay as must."""
    before = real
    for layer in sorted(kept):
        rows = kept[layer]
        assert rows[real & ~places].all(), "text went"
        assert not (rows & ~before).any(), "a token came back"
        total = places.sum(1)
        least = total.clamp(max=options["min_tokens"])
        assert ((rows & places).sum(1) >= least).all(), "fewer than min_tokens stay"
        before = rows


def check_steps(
    kind: Kind, model: Any, plain: Any, inputs: dict[str, Tensor], kept: dict[int, Tensor]
) -> None:
    """Two steps on the cache are what the oracle reads in one pass over the longer sequence."""
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    try:
        out = generate(model, inputs, 2, **wanted)
    except atp_patch.ATPError as error:
        event(f"no generation: {type(error).__name__}")
        return
    longer = extended(inputs, new_ids(inputs, out.sequences))
    grown = {n: torch.nn.functional.pad(rows, (0, 2), value=True) for n, rows in kept.items()}
    expected = masked_logits(plain, longer, grown, **kind.seen(longer))[:, -3:-1]
    of_plain = generate(plain, inputs, 2, **wanted)
    whole = extended(inputs, new_ids(inputs, of_plain.sequences))
    everything = {0: real_mask(whole)}
    in_one = masked_logits(plain, whole, everything, **kind.seen(whole))[:, -3:-1]
    if (torch.stack(of_plain.logits, 1) - in_one).abs().max() > 1e-5:
        event("the plain model's own steps are not those of one pass")
        return
    assert_close(torch.stack(out.logits, 1), expected)


def check_alone(
    kind: Kind,
    model: Any,
    samples: list[Sample],
    paint: Any,
    together: Tensor,
    kept: dict[int, Tensor],
    real: Tensor,
) -> None:
    """The last sample by itself has the answers that it has in the batch."""
    if kind.name == "hunyuan_vl":  # the plain model answers otherwise beside other samples
        return
    only = make(kind, samples[-1:], paint=paint).inputs
    alone = forward(model, only).logits
    seen = any(isinstance(piece, Picture) for piece in samples[-1].pieces)
    expected = {layer: rows[-1, real[-1]][None] for layer, rows in kept.items()}
    if seen and paint is not None:
        found = kept_of(model)
        if any(not torch.equal(found[layer], rows) for layer, rows in expected.items()):
            event("of tokens that tie, others were chosen by rounding")
            return
    assert_close(together[-1, real[-1]][None], alone, expected[max(kept)])


def test_hosts_that_are_left_out_are_those_that_share_places() -> None:
    """Guard of the tests: ``check_alone`` leaves out no other host."""
    for kind in EVERY:
        try:
            skip_where_samples_share_places(SimpleNamespace(config=kind.config()))
        except BaseException:
            assert kind.name == "hunyuan_vl"
