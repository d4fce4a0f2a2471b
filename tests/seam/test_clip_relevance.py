"""CDPruner by CLIP's text encoder: a tiny CLIP model and tokenizers, made here."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, PreTrainedTokenizerFast

import atp_patch
from tests.families.kinds import MIXED as PICTURES
from tests.families.kinds import make
from tests.families.tables import EVERY
from tests.helpers import inputs as prompts
from tests.helpers import selection as plain
from tests.helpers import tiny
from tests.helpers.compare import assert_close, snapshot
from tests.helpers.inputs import batch, real_mask
from tests.helpers.run import forward, kept_of

LONGEST = 20  # tokens of a text that the tiny CLIP reads


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a CLIP model with its tokenizer, and of the language model's tokenizer."""
    clip, words = (tmp_path_factory.mktemp(name) for name in ("clip", "words"))
    _save_clip(clip, width=32)
    vocabulary = {f"word{number}": number for number in range(tiny.VOCAB)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="word3"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(words)
    return str(clip), str(words)


def _save_clip(folder: Path, width: int) -> None:
    letters = [chr(code) for code in (*range(97, 123), *range(48, 58))]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    sizes = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(pieces) - 2, "eos_token_id": len(pieces) - 1, "pad_token_id": 0}
    text = {
        "hidden_size": 24,
        "vocab_size": len(pieces),
        "max_position_embeddings": LONGEST,
        **sizes,
        **ends,
    }
    vision = {"hidden_size": width, "image_size": 48, "patch_size": 8, **sizes}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        model = CLIPModel(config)
        for parameter in model.parameters():  # the tiny spread of fresh weights makes all alike
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    model.save_pretrained(folder)


def patched(folders: tuple[str, str], model: Any = None, **options: Any) -> Any:
    given = {"method": "cdpruner", "clip": folders[0], "tokenizer": folders[1], "keep": 0.4}
    plainly = tiny.tiny_model("llava-llama") if model is None else model
    return atp_patch.patch_model(plainly, **{**given, **options})


def expected(folders: tuple[str, str], inputs: dict[str, Tensor]) -> list[list[int]]:
    """Places that stay of each sample's visual tokens, image by image."""
    model, clip = tiny.tiny_model("llava-llama"), CLIPModel.from_pretrained(folders[0]).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folders[0])
    seen: list[Tensor] = []
    model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    forward(model, inputs)
    with torch.no_grad():
        tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
        states = tower.hidden_states[-2][:, 1:]
        pictures = clip.visual_projection(clip.vision_model.post_layernorm(states))
    found, number = [], 0
    for b, ids in enumerate(inputs["input_ids"].tolist()):
        stays: list[int] = []
        places = [at for at, one in enumerate(ids) if one == tiny.IMAGE]
        starts = [at for at in places if at - 1 not in places]
        real = real_mask(inputs)[b].tolist()
        behind = [i for at, i in enumerate(ids) if places and at > places[0] and real[at]]
        text = " ".join(f"word{one}" for one in behind if one != tiny.IMAGE)
        for start in starts:
            tokens = tokenizer(text, truncation=True, max_length=LONGEST, return_tensors="pt")
            with torch.no_grad():
                question = clip.text_projection(clip.text_model(**tokens).pooler_output)[0]
            relevance = -torch.cosine_similarity(pictures[number], question[None]).double().numpy()
            relevance = (relevance - relevance.min()) / (relevance.max() - relevance.min())
            mine = list(range(start, start + 36))
            features = seen[0][b, mine].double().numpy()
            count = 15 if len(starts) == 2 and start == starts[0] else 14  # 0.4 of 36, or of 72
            stays += [start + i for i in plain.determinantal(features, relevance, count)]
            number += 1
        found.append(sorted(stays))
    return found


def test_relevance_is_that_of_clip(folders: tuple[str, str]) -> None:
    model = patched(folders)
    inputs = batch(model, prompts.MIXED)
    forward(model, inputs)
    (kept,) = kept_of(model).values()
    visual = inputs["input_ids"] == tiny.IMAGE
    wanted = expected(folders, inputs)
    assert [row.nonzero().flatten().tolist() for row in kept & visual] == wanted
    own = patched(folders, clip=None, tokenizer=None)
    forward(own, inputs)
    assert not torch.equal(kept_of(own)[0], kept), "CLIP changes nothing: this shows nothing"


def test_batches_copies_and_unpatching(folders: tuple[str, str], tmp_path: Path) -> None:
    fresh = tiny.tiny_model("llava-llama")
    inputs = batch(fresh, prompts.MIXED)
    forward(fresh, inputs)
    before = snapshot(fresh)
    model = patched(folders, fresh)
    logits, (kept,) = forward(model, inputs).logits, kept_of(model).values()
    for b, one in enumerate(prompts.MIXED):
        real = real_mask(inputs)[b]
        alone = forward(model, batch(model, (one,))).logits
        assert_close(logits[b, real][None], alone, kept[b, real][None])
    twin = copy.deepcopy(model)
    assert torch.equal(forward(twin, inputs).logits, logits)
    atp_patch.save_pretrained(model, tmp_path)
    again = atp_patch.patch_model(tiny.tiny_model("llava-llama"), weights=tmp_path)
    assert torch.equal(forward(again, inputs).logits, logits)
    atp_patch.unpatch_model(model)
    assert snapshot(model) == before


def test_what_cannot_be_is_named(folders: tuple[str, str], tmp_path: Path) -> None:
    _save_clip(tmp_path, width=48)
    for options, error, message in (
        ({"clip": None}, atp_patch.ConfigError, "give clip= too"),
        ({"tokenizer": None}, atp_patch.WeightsError, "give tokenizer="),
        ({"clip": str(tmp_path)}, atp_patch.WeightsError, "hidden size 48, this model one of 32"),
        ({"clip": folders[1]}, atp_patch.WeightsError, "cannot be loaded as a CLIPModel"),
    ):
        with pytest.raises(error, match=message):
            patched(folders, **options)
    model = patched(folders)
    inputs = dict(batch(model, prompts.MIXED))
    given = {
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]),
        "pixel_values": inputs["pixel_values"],
        "attention_mask": inputs["attention_mask"],
    }
    given["inputs_embeds"] = given["inputs_embeds"].detach()
    with pytest.raises(atp_patch.InputError, match="pass input_ids"):
        forward(model, given)


def test_other_towers_are_refused(folders: tuple[str, str]) -> None:
    (kind,) = (kind for kind in EVERY if kind.name == "qwen2_vl")
    model = kind.build()
    with pytest.raises(atp_patch.UnsupportedModelError, match="leave clip out"):
        atp_patch.patch_model(model, method="cdpruner", clip=folders[0], tokenizer=folders[1])
    atp_patch.patch_model(model, method="cdpruner", keep=0.5)
    forward(model, make(kind, PICTURES).inputs)
