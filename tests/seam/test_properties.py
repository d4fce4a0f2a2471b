"""Any prompt, padding, layers and share: gathered is masked, a batch is its samples."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.helpers import tiny
from tests.helpers.compare import assert_close, assert_same_choice
from tests.helpers.inputs import Image, Prompt, Video, Words, batch, prompt, real_mask, visual_mask
from tests.helpers.run import METHODS, Session, forward, kept_of, patched, words

SIDES = st.integers(1, 6)
PIECES = st.one_of(
    st.builds(Words, st.integers(1, 6)),
    st.builds(Image, SIDES, SIDES),
    st.builds(Video, st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
)
STILLS = st.one_of(st.builds(Words, st.integers(1, 6)), st.just(Image()))
LAYERS = st.lists(st.integers(1, tiny.LAYERS - 1), min_size=1, max_size=4, unique=True).map(sorted)


def prompts_of(pieces: st.SearchStrategy) -> st.SearchStrategy[list[Prompt]]:
    """One to four samples that end in words."""
    body = st.lists(pieces, min_size=0, max_size=4)
    sample = st.builds(
        lambda parts, seed: prompt(*parts, Words(2), seed=seed), body, st.integers(0, 99)
    )
    return st.lists(sample, min_size=1, max_size=4)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    kind=st.sampled_from([*tiny.ALL_KINDS, tiny.WINDOWED]),
    attention=st.sampled_from(["sdpa", "eager"]),
    method=st.sampled_from(sorted(METHODS)),
    padding=st.sampled_from(["left", "right"]),
    pad_by=st.integers(0, 3),
    layers=LAYERS,
    keep=st.floats(0.1, 0.95),
    data=st.data(),
)
def test_any_batch_is_masked_and_its_samples(
    kind: str,
    attention: str,
    method: str,
    padding: str,
    pad_by: int,
    layers: list[int],
    keep: float,
    data: st.DataObject,
) -> None:
    samples = data.draw(prompts_of(PIECES if kind in tiny.QWEN else STILLS))
    options = {**METHODS[method], "layers": layers, "keep": keep}
    plain, model = tiny.tiny_model(kind, attention), patched(kind, attention, **options)
    inputs = batch(plain, samples, padding, pad_by=pad_by)
    visual, real = visual_mask(inputs), real_mask(inputs)
    assume(bool(visual.any()))
    session = Session(model, inputs)
    kept = kept_of(model)
    last = kept[layers[-1]]
    assert last[real & ~visual].all()
    assert not last[~real].any()
    assert (last & visual).any(1)[visual.any(1)].all()
    assert_close(session.logits, session.reference(plain, kept), last)
    answer = session.feed(words(len(samples), 2))
    assert_close(answer, session.reference(plain, kept)[:, -2:])
    row = data.draw(st.integers(0, len(samples) - 1))
    single = batch(plain, [samples[row]])
    alone = forward(model, single).logits
    if visual[row].any():
        for layer, mask in kept_of(model).items():
            assert_same_choice(kept[layer][row, real[row]][None], mask)
    survivors = last[row, real[row]][None]
    assert torch.equal(survivors, survivors & real_mask(single))
    assert_close(session.logits[row, real[row]][None], alone, survivors)
