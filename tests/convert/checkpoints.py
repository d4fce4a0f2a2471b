"""Synthetic checkpoints with the tensor names and the files of other packages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import gelu, linear
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.families.kinds import TEXT, TOWER
from tests.helpers import tiny

Tensors = dict[str, Tensor]
IMAGE_SIZE, PATCH = 48, 8
UNNEEDED = {
    "model.vision_tower.vision_tower.vision_model.embeddings.position_ids",
    "model.layers.0.self_attn.rotary_emb.inv_freq",
}
LLAVA = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "image_aspect_ratio": "pad",
    "mm_hidden_size": 32,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "tune_mm_mlp_adapter": False,
    "use_mm_proj": True,
    "torch_dtype": "float32",
    "rope_theta": 5000.0,
}


class Original:
    """LLaVA's parts, each a model of its own, and what they compute together."""

    def __init__(self, projector: str = "mlp2x_gelu") -> None:
        torch.manual_seed(3)
        self.text = LlamaConfig(**TEXT, rope_theta=5000.0, tie_word_embeddings=False)
        self.vision = CLIPVisionConfig(**TOWER, image_size=IMAGE_SIZE, patch_size=PATCH)
        self.language_model = LlamaForCausalLM(self.text).eval()
        self.tower = CLIPVisionModel(self.vision).eval()
        width = self.text.hidden_size
        layers = (
            {"": (32, width)} if projector == "linear" else {"0.": (32, width), "2.": (width,) * 2}
        )
        self.projector: Tensors = {}
        for name, (into, out) in layers.items():
            self.projector[f"{name}weight"] = torch.randn(out, into) / into**0.5
            self.projector[f"{name}bias"] = torch.randn(out)
        for model in (self.language_model, self.tower):
            tiny._scale_weights(model)

    def config(self, **more: Any) -> dict[str, Any]:
        """LLaVA's config.json."""
        text = {k: v for k, v in TEXT.items() if k != "head_dim"}
        return {**text, **LLAVA, **more}

    def tower_tensors(self) -> Tensors:
        """As CLIP's files name them."""
        names = {k.removeprefix("vision_model."): v for k, v in self.tower.state_dict().items()}
        return {f"vision_model.{name}": tensor for name, tensor in names.items()}

    def flat(self, *, tower: bool = True) -> Tensors:
        """All tensors as LLaVA names them."""
        tensors = dict(self.language_model.state_dict())
        tensors |= {f"model.mm_projector.{k}": v for k, v in self.projector.items()}
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(4.0)
        if tower:
            inside = {
                **self.tower_tensors(),
                "vision_model.embeddings.position_ids": torch.arange(37),
            }
            tensors |= {f"model.vision_tower.vision_tower.{k}": v for k, v in inside.items()}
        return tensors

    def logits(self, ids: Tensor, pixels: Tensor) -> Tensor:
        """(B, L, words): placeholders of ``ids`` (beyond the words) replaced by features."""
        with torch.no_grad():
            hidden = self.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            weights = self.projector
            if "weight" in weights:
                features = linear(hidden, weights["weight"], weights["bias"])
            else:
                inner = gelu(linear(hidden, weights["0.weight"], weights["0.bias"]))
                features = linear(inner, weights["2.weight"], weights["2.bias"])
            visual = ids >= tiny.VOCAB
            embeds = self.language_model.get_input_embeddings()(ids.masked_fill(visual, 0))
            embeds[visual] = features.flatten(0, 1)
            return self.language_model(inputs_embeds=embeds).logits


def write(folder: Path, tensors: Tensors, kind: str = "safetensors", shards: int = 1) -> Path:
    """Weights in one file or in shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    names = sorted(tensors)
    tables = [{k: tensors[k].contiguous().clone() for k in names[i::shards]} for i in range(shards)]
    where = {}
    for number, table in enumerate(tables):
        part = f"-{number + 1:05}-of-{shards:05}" if shards > 1 else ""
        path = folder / f"{stem}{part}.{kind}"
        save_file(table, path) if kind == "safetensors" else torch.save(table, path)
        where |= dict.fromkeys(table, path.name)
    if shards > 1:
        save_json(folder / f"{stem}.{kind}.index.json", {"weight_map": where})
    return folder


def write_vila(folder: Path, original: Original, projector: str = "mlp2x_gelu") -> Path:
    """A checkpoint in VILA's three folders."""
    write(folder / "llm", original.language_model.state_dict(), shards=2)
    save_json(folder / "llm" / "config.json", original.text.to_dict())
    layers = {f"layers.{k}": v for k, v in original.projector.items()}
    write(folder / "mm_projector", layers)
    save_json(folder / "mm_projector" / "config.json", {"mm_projector_type": projector})
    write(folder / "vision_tower", original.tower_tensors())
    save_json(folder / "vision_tower" / "config.json", original.vision.to_dict())
    top = {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
    }
    save_json(folder / "config.json", top)
    return folder


def save_json(path: Path, table: Any) -> None:
    """Write a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table), encoding="utf-8")


def save_tokenizer(folder: Path, special: dict[str, int] | None = None) -> None:
    """A tokenizer of one word an id, those of ``special`` at theirs."""
    words = {f"w{i}": i for i in range(tiny.VOCAB)}
    named = {"<unk>": 0, "<s>": tiny.BOS, "</s>": tiny.EOS, **(special or {})}
    words = {word: i for word, i in words.items() if i not in named.values()} | named
    table = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=table, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_tokens(list(special or ()), special_tokens=True)
    tokenizer.save_pretrained(folder)
