"""Every family with every kind of method in every way to generate: right, or refused by name.

    python -m tests.cells cells.jsonl                  # all of them; a stopped run goes on
    python -m tests.cells cells.jsonl --families llava qwen2_vl --ways greedy beams

A cell is a family of the tests' tables, a kind of method, a way to generate, and a setting: an
attention backend, a padding and a kind of cache. Cells are tried in a drawn order, so that a run
that was stopped is a sample of all of them.
``python -m tests.cells_page`` reports them. What a cell shows is one of these:

right           the logits of every step are those of the reference, and the ids follow from them.
refused         atp_patch raised an error of its own, whose message is kept.
host refuses    the plain model raises on the same call.
not judged      the plain model's own cached steps are not those of its whole forward passes, so
                that the reference does not hold there.
wrong           other logits or ids than the reference's.
crashed         an error that is no refusal, of a call that the plain model takes.

The reference of methods inside the decoder and at its door is the plain model at full length whose
later layers cannot see the pruned tokens (tests/helpers/oracle.py), in one pass over the finished
sequences. Methods that change the tower's tokens, and VoCo, have no such mask: there it is the
patched model's own pass without a cache, which the tests of these methods compare with their
algorithms written out. Assisted generation is compared with plain greedy steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import atp_patch
from atp_patch.seam import CACHE_ARGUMENT
from tests.families.kinds import MIXED, SINGLE, Kind, make
from tests.families.tables import EVERY
from tests.families.test_mends import embedded
from tests.helpers.caches import quantized_cache
from tests.helpers.doors import Asked
from tests.helpers.inputs import Inputs, extended, real_mask
from tests.helpers.oracle import masked_logits
from tests.helpers.run import forward, kept_of, words
from tests.helpers.tiny import FIRST_WORD

TOKENS = 3
TOLERANCE = 1e-4
OUTCOMES = ("right", "refused", "host refuses", "not judged", "wrong", "crashed")
KINDS = {kind.name: kind for kind in EVERY}
METHODS: dict[str, dict[str, Any]] = {
    "layer": {"method": "fastv", "keep": 0.5},
    "layer, learned": {"method": "atp", "keep": 0.5, "thresholds": "learned", "reference_grid": 6},
    "door": {"method": Asked(merges=False), "keep": 0.5},
    "door, then layer": {"method": [Asked(merges=False), "fastv"], "keep": 0.6},
    "tower": {"method": "prumerge+", "keep": 0.5},
    "picture": {"method": "downsample", "keep": 0.5},
    "voco": {"method": "voco", "num_tokens": 2},
}
MASKED = ("layer", "layer, learned", "door", "door, then layer")
SETTINGS = (
    *product(("sdpa", "eager"), ("left", "none"), ("dynamic", "static", "without a cache")),
    ("sdpa", "left", "quantized"),
)
VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}


@dataclass(frozen=True)
class Cell:
    """What is tried.

    Attributes:
        family: the name of a row of the tests' tables.
        method: a key of ``METHODS``.
        way: a key of ``WAYS``.
        attention: the attention backend that is asked for; some hosts have one only.
        padding: "left" is a ragged batch, "none" a single prompt.
        cache: "dynamic", "static", "quantized" or "without a cache".
    """

    family: str
    method: str
    way: str
    attention: str
    padding: str
    cache: str


def cells() -> list[Cell]:
    """All cells."""
    found: dict[Cell, None] = {}
    for family, method, way, setting in product(KINDS, METHODS, WAYS, SETTINGS):
        attention, padding, cache = setting
        if way in ONE_SAMPLE:
            padding = "none"
        if way in NEEDS_CACHE:
            cache = "dynamic"
        found[Cell(family, method, way, attention, padding, cache)] = None
    return list(found)


# -- ways to generate -----------------------------------------------------------------------------


@dataclass
class Said:
    """What a way to generate gave.

    Attributes:
        inputs: the prompts.
        ids: (B, n) the answers, several of each prompt next to each other.
        logits: (B, n, vocabulary) of each of their steps; None where they are not given.
        choose: takes the reference's logits of the steps, and gives the numbers to compare with
            ``logits``; None: the logits themselves.
        scores: (B,) the beams' own scores of their answers, or None.
        repeats: how many answers each prompt has.
    """

    inputs: Inputs
    ids: Tensor
    logits: Tensor | None = None
    choose: Callable[[Tensor], Tensor] | None = None
    scores: Tensor | None = None
    repeats: int = 1


def _options(cell: Cell, model: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "max_new_tokens": TOKENS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "suppress_tokens": list(range(FIRST_WORD)),
        "eos_token_id": None,
        "use_cache": cell.cache != "without a cache",
    }
    if cell.cache == "static":
        given["cache_implementation"] = "static"
    if cell.cache == "quantized":
        given[CACHE_ARGUMENT] = quantized_cache(model)
    return given


def _generated(model: Any, inputs: Inputs, options: dict[str, Any]) -> Said:
    torch.manual_seed(0)
    out = model.generate(**inputs, **options)
    ids = out.sequences[:, inputs["input_ids"].shape[1] :]
    scores = out.get("sequences_scores")
    logits = torch.stack(out.logits, 1) if scores is None and out.logits else None
    repeats = options.get("num_return_sequences", 1)
    return Said(inputs, ids, logits, scores=scores, repeats=repeats)


def greedy(model: Any, inputs: Inputs, cell: Cell) -> Said:
    return _generated(model, inputs, _options(cell, model))


def sampling(model: Any, inputs: Inputs, cell: Cell) -> Said:
    more = {"do_sample": True, "num_return_sequences": 2}
    return _generated(model, inputs, _options(cell, model) | more)


def beams(model: Any, inputs: Inputs, cell: Cell) -> Said:
    return _generated(
        model, inputs, _options(cell, model) | {"num_beams": 2, "output_scores": True}
    )


def several_beams(model: Any, inputs: Inputs, cell: Cell) -> Said:
    more = {"num_beams": 2, "num_return_sequences": 2, "output_scores": True}
    return _generated(model, inputs, _options(cell, model) | more)


def prompt_lookup(model: Any, inputs: Inputs, cell: Cell) -> Said:
    more = {"prompt_lookup_num_tokens": 2}
    return _generated(model, inputs, _options(cell, model) | more)


def assistant(model: Any, inputs: Inputs, cell: Cell) -> Said:
    """The model's own plain twin proposes tokens."""
    more = {"assistant_model": KINDS[cell.family].build()}
    return _generated(model, inputs, _options(cell, model) | more)


class _Collects(BaseStreamer):
    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.parts.append(value.reshape(1, -1).cpu())

    def end(self) -> None:
        """Nothing is left to do."""


def streaming(model: Any, inputs: Inputs, cell: Cell) -> Said:
    streamer = _Collects()
    said = _generated(model, inputs, _options(cell, model) | {"streamer": streamer})
    said.ids = torch.cat(streamer.parts[1:], 1)  # the prompt comes first
    return said


def guidance(model: Any, inputs: Inputs, cell: Cell) -> Said:
    """Classifier-free guidance against the prompt's last token alone, without a picture."""
    scale = 1.5
    options = _options(cell, model) | {"guidance_scale": scale, "output_scores": True}
    torch.manual_seed(0)
    out = model.generate(**inputs, **options)
    ids = out.sequences[:, inputs["input_ids"].shape[1] :]
    plain = KINDS[cell.family].build()
    bare = torch.cat([inputs["input_ids"][:, -1:], ids[:, :-1]], 1)
    with torch.no_grad():
        without = plain(input_ids=bare, attention_mask=torch.ones_like(bare)).logits.log_softmax(-1)

    def guided(logits: Tensor) -> Tensor:
        mixed = without + scale * (logits.log_softmax(-1) - without)
        return mixed[..., FIRST_WORD:]

    return Said(inputs, ids, torch.stack(out.scores, 1)[..., FIRST_WORD:], guided)


def embeddings(model: Any, inputs: Inputs, cell: Cell) -> Said:
    """Embeddings with the pictures' features in them, beside the ids and without pixels."""
    given = {**embedded(KINDS[cell.family].build(), inputs), "input_ids": inputs["input_ids"]}
    given |= {name: value for name, value in inputs.items() if _tells_grids(name)}
    said = _generated(model, given, _options(cell, model))
    said.inputs = inputs
    return said


def _tells_grids(name: str) -> bool:
    return name.endswith(("grid_thw", "sizes", "shapes", "token_type_ids"))


def turns(model: Any, inputs: Inputs, cell: Cell) -> Said:
    """A second question on the cache of the first answer."""
    torch.manual_seed(0)
    first = model.generate(**inputs, **_options(cell, model))
    answer = first.sequences[:, inputs["input_ids"].shape[1] :]
    history = extended(inputs, torch.cat([answer, words(len(answer), 4)], 1))
    asked = {name: history[name] for name in ("input_ids", "attention_mask")}
    asked[CACHE_ARGUMENT] = first.past_key_values
    out = model.generate(**asked, **_options(cell, model))
    ids = out.sequences[:, history["input_ids"].shape[1] :]
    return Said(history, ids, torch.stack(out.logits, 1))


def copied_prefix(model: Any, inputs: Inputs, cell: Cell) -> Said:
    """Two questions, each on a copy of one cache of the prompt; the second is compared."""
    torch.manual_seed(0)
    first = model.generate(**inputs, **_options(cell, model) | {"max_new_tokens": 1})
    answer = first.sequences[:, inputs["input_ids"].shape[1] :]
    for seed in (1, 2):
        history = extended(inputs, torch.cat([answer, words(len(answer), 3, seed)], 1))
        asked = {name: history[name] for name in ("input_ids", "attention_mask")}
        asked[CACHE_ARGUMENT] = copy.deepcopy(first.past_key_values)
        out = model.generate(**asked, **_options(cell, model))
    ids = out.sequences[:, history["input_ids"].shape[1] :]
    return Said(history, ids, torch.stack(out.logits, 1))


def custom(model: Any, inputs: Inputs, cell: Cell) -> Said:
    """A decoding loop of the caller's own, handed to ``generate``."""

    def loop(model: Any, input_ids: Tensor, generation_config: Any, **given: Any) -> Tensor:
        given.pop("logits_processor", None)
        given.pop("stopping_criteria", None)
        first = True
        for _ in range(TOKENS):
            step = (
                model.prepare_inputs_for_generation(
                    input_ids, is_first_iteration=first, next_sequence_length=None, **given
                )
                if first
                else model.prepare_inputs_for_generation(
                    input_ids, next_sequence_length=1 if given.get("use_cache") else None, **given
                )
            )
            out = model(**step, return_dict=True)
            logits = out.logits[:, -1].clone()
            logits[:, :FIRST_WORD] = -torch.inf
            input_ids = torch.cat([input_ids, logits.argmax(-1, keepdim=True)], 1)
            given = model._update_model_kwargs_for_generation(out, given)
            first = False
        return input_ids

    torch.manual_seed(0)
    options = _options(cell, model)
    for name in ("return_dict_in_generate", "output_logits"):
        del options[name]
    with torch.no_grad():
        sequences = model.generate(**inputs, **options, custom_generate=loop)
    return Said(inputs, sequences[:, inputs["input_ids"].shape[1] :])


WAYS: dict[str, Callable[[Any, Inputs, Cell], Said]] = {
    "greedy": greedy,
    "sampling": sampling,
    "beams": beams,
    "several beams": several_beams,
    "prompt lookup": prompt_lookup,
    "assistant": assistant,
    "streaming": streaming,
    "guidance": guidance,
    "embeddings": embeddings,
    "turns": turns,
    "copied prefix": copied_prefix,
    "custom loop": custom,
}
ONE_SAMPLE = ("prompt lookup", "assistant", "streaming", "guidance")
NEEDS_CACHE = ("prompt lookup", "assistant", "turns", "copied prefix")


# -- references -----------------------------------------------------------------------------------


def reference(said: Said, whole: Callable[[Inputs], Tensor]) -> Tensor:
    """(B, n, vocabulary) logits of the steps, each answer read in one pass over its sequence.

    Args:
        said: the answers.
        whole: takes prompts with answers behind them, and gives (prompts, L, vocabulary) logits.
    """
    steps = said.ids.shape[1]
    answers = said.ids.unflatten(0, (-1, said.repeats)).unbind(1)
    found = [whole(extended(said.inputs, one))[:, -steps - 1 : -1] for one in answers]
    return torch.stack(found, 1).flatten(0, 1)


def judged(said: Said, expected: Tensor) -> str | None:
    """What is wrong with an answer, or None.

    Args:
        said: the answer.
        expected: the reference's logits of its steps.
    """
    allowed = expected.clone()
    allowed[..., :FIRST_WORD] = -torch.inf
    if said.scores is not None:
        each = expected.log_softmax(-1).gather(-1, said.ids[..., None])[..., 0]
        far = (each.sum(1) / said.ids.shape[1] - said.scores).abs().max().item()
        return f"scores of beams differ by {far:.2g}" if far > TOLERANCE else None
    if said.logits is not None:
        wanted = expected if said.choose is None else said.choose(expected)
        far = (said.logits - wanted).abs().max().item()
        return None if far <= TOLERANCE else f"logits differ by {far:.2g}"
    best = allowed.amax(-1) - allowed.gather(-1, said.ids[..., None])[..., 0]
    return None if float(best.max()) <= TOLERANCE else f"not the best by {float(best.max()):.2g}"


def _uncached(model: Any, inputs: Inputs) -> Tensor:
    """Logits of the patched model's own pass over whole sequences."""
    return forward(model, inputs, use_cache=False).logits


def _masked(kind: Kind, model: Any, plain: Any) -> Callable[[Inputs], Tensor]:
    kept = kept_of(model)

    def whole(inputs: Inputs) -> Tensor:
        prompts, length = inputs["input_ids"].shape
        grown = {}
        for layer, rows in kept.items():  # beams and several answers share the choice of a prompt
            one_each = rows[:: len(rows) // prompts]
            behind = length - rows.shape[1]
            grown[layer] = torch.nn.functional.pad(one_each, (0, behind), value=True)
        return masked_logits(plain, inputs, grown, **kind.seen(inputs))

    return whole


def _unpruned(kind: Kind, plain: Any) -> Callable[[Inputs], Tensor]:
    def whole(inputs: Inputs) -> Tensor:
        return masked_logits(plain, inputs, {0: real_mask(inputs)}, **kind.seen(inputs))

    return whole


# -- one cell -------------------------------------------------------------------------------------


def tried(cell: Cell) -> tuple[str, str]:
    """The outcome of a cell, and a word about it."""
    kind = KINDS[cell.family]
    inputs = make(kind, MIXED if cell.padding == "left" else SINGLE).inputs
    try:
        model = _model(kind, cell)
        settings = dict(METHODS[cell.method])
        if "layer" in cell.method:
            settings["layers"] = kind.layers
        torch.manual_seed(0)
        atp_patch.patch_model(model, **settings)
    except atp_patch.ATPError as error:
        return "refused", str(error)
    way = WAYS[cell.way]
    try:
        said = way(model, inputs, cell)
    except atp_patch.ATPError as error:
        return "refused", str(error)
    except Exception as error:
        told = "".join(traceback.format_exception_only(error)).strip()
        return ("host refuses" if _refuses(kind, way, inputs, cell) else "crashed"), told
    plain = _model(kind, cell)
    masked = cell.method in MASKED
    whole = _masked(kind, model, plain) if masked else partial(_uncached, model)
    try:
        wrong = judged(said, reference(said, whole))
    except Exception as error:  # the whole pass over the prompts with the answers behind them
        wrong = f"no reference: {type(error).__name__}: {error}"
    if wrong is None:
        return "right", ""
    try:
        of_plain = way(plain, inputs, cell)
        holds = judged(of_plain, reference(of_plain, _unpruned(kind, _model(kind, cell))))
    except Exception as error:
        return "not judged", f"{wrong}; the plain model: {type(error).__name__}"
    return ("wrong", wrong) if holds is None else ("not judged", f"{wrong}; plain: {holds}")


def _model(kind: Kind, cell: Cell) -> PreTrainedModel:
    model = kind.build()
    if kind.attention == "sdpa" and cell.attention != "sdpa":
        model.set_attn_implementation(cell.attention)
    return model


def _refuses(kind: Kind, way: Any, inputs: Inputs, cell: Cell) -> bool:
    try:
        way(_model(kind, cell), inputs, cell)
    except Exception:
        return True
    return False


# -- the program ----------------------------------------------------------------------------------


def run(out: Path, wanted: Sequence[Cell]) -> Counter[str]:
    """Try the cells that the file does not hold, in a drawn order, and add a line for each."""
    known = {_key(json.loads(line)) for line in _lines(out)}
    found: Counter[str] = Counter()
    with out.open("a", encoding="utf-8") as file:
        for cell in random.Random(0).sample(wanted, len(wanted)):
            if _key(vars(cell)) in known:
                continue
            start = time.monotonic()
            outcome, why = tried(cell)
            found[outcome] += 1
            row = {**vars(cell), "outcome": outcome, "why": why[:300]}
            row["seconds"] = round(time.monotonic() - start, 2)
            row |= {"day": str(datetime.now(timezone.utc).date()), **VERSIONS}
            file.write(json.dumps(row) + "\n")
            file.flush()
            if outcome in ("wrong", "crashed"):
                sys.stderr.write(f"{outcome}: {cell}: {why}\n")
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in Cell.__annotations__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run cells; 1 where one is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.cells", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path)
    parser.add_argument("--families", nargs="+", choices=KINDS, default=KINDS, metavar="FAMILY")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    wanted = [
        cell
        for cell in cells()
        if cell.family in args.families and cell.method in args.methods and cell.way in args.ways
    ]
    found = run(args.file, wanted)
    sys.stdout.write(", ".join(f"{name}: {found[name]}" for name in OUTCOMES) + "\n")
    return int(bool(found["wrong"] + found["crashed"]))


if __name__ == "__main__":
    sys.exit(main())
