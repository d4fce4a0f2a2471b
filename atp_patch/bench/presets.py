"""Models in the shapes of real checkpoints but with random weights, which suffice for timing."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers  # which loads a class of its own when it is used
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2Config,
    Qwen2VLConfig,
)

from atp_patch.contract.errors import ConfigError
from atp_patch.families import family_of, scaled_layers

Size = tuple[int, int]
"""Width and height of an image in pixels."""

_FIRST_WORD, _PLACEHOLDER = 10, 9


@dataclass(frozen=True)
class Depth:
    """Numbers of layers.

    Attributes:
        decoder: the number of layers of the language model.
        tower: the number of layers of the vision tower.
    """

    decoder: int
    tower: int


@dataclass(frozen=True)
class Preset(ABC):
    """The shape of a model; subclasses know the vision tower and the inputs of its family.

    Attributes:
        hidden_size: the hidden size of the decoder.
        mlp_size: the inner size of the decoder's MLPs.
        num_layers: the number of decoder layers.
        num_heads: the number of query heads of the decoder's attention.
        num_kv_heads: the number of heads of the decoder's keys and values.
        vocab_size: number of token ids.
        image: width and height of the image in pixels, where the command names none.
        tower_layers: number of layers of the vision tower.
    """

    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    image: Size
    tower_layers: int

    @abstractmethod
    def config(self, depth: Depth) -> Any:
        """The family's configuration in this shape."""

    @abstractmethod
    def visual_tokens(self, image: Size) -> int:
        """The number of visual tokens of one image.

        Raises:
            ConfigError: where the model takes no image of this size.
        """

    @abstractmethod
    def pixels(self, image: Size, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random images as the model's processor would hand them over."""

    def pruning_layers(self, num_layers: int) -> list[int]:
        """The pruning layers of a decoder of this depth, where the command names none."""
        return scaled_layers(num_layers)

    def depth(self, scale: float) -> Depth:
        """Numbers of layers at a share of the full depth, at least two of decoder and tower each.

        Raises:
            ConfigError: where ``scale`` is not above 0 and at most 1.
        """
        if not 0 < scale <= 1:
            raise ConfigError(f"--scale {scale:g}: give a share of the layers, above 0, at most 1.")
        return Depth(*(max(2, round(scale * n)) for n in (self.num_layers, self.tower_layers)))

    def build(self, scale: float, attention: str, device: str, dtype: torch.dtype) -> nn.Module:
        """Build a model with random weights.

        Args:
            scale: share of the decoder's and the tower's layers that are built.
            attention: "sdpa", "eager" or "flash_attention_2".
            device: the device of the weights; on "meta" there are none.
            dtype: the dtype of the weights.
        """
        with torch.device(device):
            model: nn.Module = transformers.AutoModelForImageTextToText.from_config(
                self.config(self.depth(scale)), dtype=dtype, attn_implementation=attention
            )
        return model.to(device).eval()

    def inputs(
        self, image: Size, batch_size: int, prompt_tokens: int, seed: int
    ) -> dict[str, Tensor]:
        """Random inputs: each sample has one image and ``prompt_tokens`` text tokens, a tenth of
        them before the image.
        """
        generator = torch.Generator().manual_seed(seed)
        shape = (batch_size, prompt_tokens)
        text = torch.randint(_FIRST_WORD, self.vocab_size, shape, generator=generator)
        before = prompt_tokens // 10
        places = torch.full((batch_size, self.visual_tokens(image)), _PLACEHOLDER)
        ids = torch.cat([text[:, :before], places, text[:, before:]], dim=1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return given | self.pixels(image, batch_size, generator)

    def _text(self, depth: Depth) -> dict[str, Any]:
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.mlp_size,
            "num_hidden_layers": depth.decoder,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": 32768,
        }


@dataclass(frozen=True)
class _Tiled(Preset):
    """A model whose vision tower reads square images of one size, or square tiles.

    Attributes:
        side: width and height of an image or a tile in pixels.
        patch: width and height of a patch in pixels.
        tower_sizes: hidden size, MLP size and number of heads of the tower.
    """

    side: int = 336

    patch: int = 14
    tower_sizes: tuple[int, int, int] = (1024, 4096, 16)

    def tiles(self, image: Size) -> int:
        """The number of pictures that the tower reads of one image."""
        if image != (self.side, self.side):
            raise ConfigError(
                f"--image {image[0]}x{image[1]}: this model takes {self.side}x{self.side}."
            )
        return 1

    def pixels(self, image: Size, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random images as the model's processor would hand them over."""
        shape = (batch_size * self.tiles(image), 3, self.side, self.side)
        return {"pixel_values": torch.randn(shape, generator=generator)}

    def _vision(self, depth: Depth) -> dict[str, Any]:
        hidden, mlp, heads = self.tower_sizes
        return {
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_hidden_layers": depth.tower,
            "num_attention_heads": heads,
            "image_size": self.side,
            "patch_size": self.patch,
        }


class LlavaPreset(_Tiled):
    """LLaVA-1.5: CLIP ViT-L/14 at 336 x 336 pixels, 576 visual tokens."""

    def config(self, depth: Depth) -> Any:
        """As the base class says."""
        return LlavaConfig(
            vision_config=CLIPVisionConfig(**self._vision(depth)),
            text_config=LlamaConfig(**self._text(depth)),
            image_token_id=_PLACEHOLDER,
            image_seq_length=self.visual_tokens(self.image),
        )

    def visual_tokens(self, image: Size) -> int:
        """The number of visual tokens of one image."""
        return self.tiles(image) * (self.side // self.patch) ** 2


class InternVLPreset(_Tiled):
    """InternVL: tiles of 448 x 448 pixels with 256 visual tokens each. Where there are several, a
    picture of the whole image is added.
    """

    def config(self, depth: Depth) -> Any:
        """As the base class says."""
        return InternVLConfig(
            vision_config=InternVLVisionConfig(**self._vision(depth)),
            text_config=Qwen2Config(**self._text(depth)),
            image_token_id=_PLACEHOLDER,
        )

    def tiles(self, image: Size) -> int:
        """The number of tiles, and one more for the whole picture where there are several."""
        if any(side % self.side for side in image):
            raise ConfigError(
                f"--image {image[0]}x{image[1]}: give multiples of {self.side} pixels."
            )
        number = math.prod(side // self.side for side in image)
        return number + (number > 1)

    def visual_tokens(self, image: Size) -> int:
        """The number of visual tokens of one image."""
        return self.tiles(image) * (self.side // self.patch // 2) ** 2


_QWEN_IDS = {
    "image_token_id": _PLACEHOLDER,
    "video_token_id": _PLACEHOLDER - 1,
    "vision_start_token_id": _PLACEHOLDER - 2,
    "vision_end_token_id": _PLACEHOLDER - 3,
}


class QwenPreset(Preset):
    """Qwen2-VL: images of any size, with one visual token for each 28 x 28 pixels.

    Attributes:
        patch: width and height of a patch in pixels; a visual token is made of 2 x 2 patches.
    """

    patch: ClassVar[int] = 14

    def config(self, depth: Depth) -> Any:
        """The family's configuration in this shape."""
        mrope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        return Qwen2VLConfig(
            text_config=self._text(depth) | {"rope_parameters": mrope},
            vision_config={
                "depth": depth.tower,
                "embed_dim": 1280,
                "num_heads": 16,
                "mlp_ratio": 4,
                "hidden_size": self.hidden_size,
                "patch_size": self.patch,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            **_QWEN_IDS,
        )

    def visual_tokens(self, image: Size) -> int:
        """The number of visual tokens of one image."""
        unit = 2 * self.patch
        if any(side % unit for side in image):
            raise ConfigError(f"--image {image[0]}x{image[1]}: give multiples of {unit} pixels.")
        return math.prod(side // unit for side in image)

    def pixels(self, image: Size, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random images as the model's processor would hand them over."""
        columns, rows = (side // self.patch for side in image)
        values = torch.randn(batch_size * rows * columns, 6 * self.patch**2, generator=generator)
        grid = torch.tensor([[1, rows, columns]] * batch_size)
        return {"pixel_values": values, "image_grid_thw": grid}

    def inputs(
        self, image: Size, batch_size: int, prompt_tokens: int, seed: int
    ) -> dict[str, Tensor]:
        """Random inputs as of any model, with the token types that tell images from text."""
        given = super().inputs(image, batch_size, prompt_tokens, seed)
        return given | {"mm_token_type_ids": (given["input_ids"] == _PLACEHOLDER).long()}


_GEMMA_PATCH, _GEMMA_UNIT = 16, 48
_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Gemma4Preset(Preset):
    """Gemma 4: images of any size, with one visual token for each 48 x 48 pixels.

    The last layers reuse the keys of earlier ones, at any scale. Where fewer layers are built, they
    are about the same share.

    Attributes:
        reusing_layers: the number of decoder layers that reuse keys.
        period: one layer in so many attends to everything, and the others within a window.
        window: the number of tokens in the window.
        head_dim, full_head_dim: size of a head of sliding and of full layers.
        per_layer_size: hidden size of the further inputs of each layer.
        tower_sizes: hidden size, MLP size and number of heads of the tower.
    """

    reusing_layers: int
    period: int
    window: int = 512
    head_dim: int = 256
    full_head_dim: int = 512
    per_layer_size: int = 256
    tower_sizes: tuple[int, int, int] = (768, 3072, 12)

    def own_keys(self, num_layers: int) -> int:
        """The number of first layers that make keys of their own, whole periods of them."""
        share = num_layers * (self.num_layers - self.reusing_layers) / self.num_layers
        return min(num_layers, self.period * max(1, round(share / self.period)))

    def pruning_layers(self, num_layers: int) -> list[int]:
        """The pruning layers, none behind the first layer whose keys are reused."""
        own = self.own_keys(num_layers)
        last = num_layers - 1 if own == num_layers else own - 2  # the last sliding layer of its own
        return sorted({min(layer, last) for layer in scaled_layers(num_layers)})

    def config(self, depth: Depth) -> Any:
        """The family's configuration in this shape."""
        hidden, mlp, heads = self.tower_sizes
        number = range(1, depth.decoder + 1)
        text = self._text(depth) | {
            "num_kv_shared_layers": depth.decoder - self.own_keys(depth.decoder),
            "use_double_wide_mlp": True,
            "layer_types": [_SLIDING if n % self.period else _FULL for n in number],
            "sliding_window": self.window,
            "head_dim": self.head_dim,
            "global_head_dim": self.full_head_dim,
            "hidden_size_per_layer_input": self.per_layer_size,
            "vocab_size_per_layer_input": self.vocab_size,
            "final_logit_softcapping": 30.0,
        }
        vision = {
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_hidden_layers": depth.tower,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": hidden // heads,
        }
        return transformers.Gemma4Config(
            text_config=transformers.Gemma4TextConfig(**text),
            vision_config=transformers.Gemma4VisionConfig(**vision),
            image_token_id=_PLACEHOLDER,
            video_token_id=_PLACEHOLDER - 1,
            audio_token_id=_PLACEHOLDER - 2,
        )

    def visual_tokens(self, image: Size) -> int:
        """The number of visual tokens of one image."""
        if any(side % _GEMMA_UNIT for side in image):
            raise ConfigError(
                f"--image {image[0]}x{image[1]}: give multiples of {_GEMMA_UNIT} pixels."
            )
        return math.prod(side // _GEMMA_UNIT for side in image)

    def pixels(self, image: Size, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random images as the model's processor would hand them over."""
        columns, rows = (side // _GEMMA_PATCH for side in image)
        shape = (batch_size, rows * columns, 3 * _GEMMA_PATCH**2)
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        places = torch.stack([column.flatten(), row.flatten()], -1)
        return {
            "pixel_values": torch.rand(shape, generator=generator),
            "image_position_ids": places.repeat(batch_size, 1, 1),
        }

    def inputs(
        self, image: Size, batch_size: int, prompt_tokens: int, seed: int
    ) -> dict[str, Tensor]:
        """Random inputs as of any model, with the token types that tell images from text."""
        given = super().inputs(image, batch_size, prompt_tokens, seed)
        return given | {"mm_token_type_ids": (given["input_ids"] == _PLACEHOLDER).long()}


class Qwen35Preset(QwenPreset):
    """Qwen 3.5: images of any size, with one visual token for each 32 x 32 pixels. Three of four
    layers are linear attention.
    """

    patch: ClassVar[int] = 16

    def config(self, depth: Depth) -> Any:
        """The family's configuration in this shape."""
        rope = {
            "rope_type": "default",
            "rope_theta": 1e7,
            "mrope_section": [11, 11, 10],
            "mrope_interleaved": True,
            "partial_rotary_factor": 0.25,
        }
        return transformers.Qwen3_5Config(
            text_config=self._text(depth) | {"head_dim": 256, "rope_parameters": rope},
            vision_config={"depth": depth.tower, "out_hidden_size": self.hidden_size},
            **_QWEN_IDS,
        )

    def pruning_layers(self, num_layers: int) -> list[int]:
        """The pruning layers, each behind one that attends."""
        return _behind_attention(self, num_layers)


@dataclass(frozen=True)
class Lfm2VlPreset(Preset):
    """LFM2-VL: tiles of 512 x 512 pixels with 256 visual tokens each. Where there are several, a
    small view of the whole image is added. Ten of sixteen layers are short convolutions.

    Attributes:
        tile: width and height of a tile in pixels; a visual token is made of 32 x 32.
        tower_sizes: hidden size, MLP size and number of heads of the tower.
    """

    tile: int = 512
    tower_sizes: tuple[int, int, int] = (1152, 4304, 16)

    def config(self, depth: Depth) -> Any:
        """The family's configuration in this shape."""
        hidden, mlp, heads = self.tower_sizes
        attends = {2, 5, 8, 10, 12, 14}
        types = ["full_attention" if n in attends else "conv" for n in range(depth.decoder)]
        return transformers.Lfm2VlConfig(
            text_config=self._text(depth) | {"model_type": "lfm2", "layer_types": types},
            vision_config={
                "model_type": "siglip2_vision_model",
                "hidden_size": hidden,
                "intermediate_size": mlp,
                "num_hidden_layers": depth.tower,
                "num_attention_heads": heads,
                "num_patches": 256,
                "vision_use_head": False,
            },
            image_token_id=_PLACEHOLDER,
        )

    def pruning_layers(self, num_layers: int) -> list[int]:
        """The pruning layers, each behind one that attends."""
        return _behind_attention(self, num_layers)

    def _tiles(self, image: Size) -> int:
        if any(side % self.tile for side in image):
            raise ConfigError(
                f"--image {image[0]}x{image[1]}: give multiples of {self.tile} pixels."
            )
        number = math.prod(side // self.tile for side in image)
        return number + (number > 1)

    def visual_tokens(self, image: Size) -> int:
        """The number of visual tokens of one image."""
        return self._tiles(image) * (self.tile // 32) ** 2

    def pixels(self, image: Size, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random images as the model's processor would hand them over."""
        tiles, side = batch_size * self._tiles(image), self.tile // 16
        return {
            "pixel_values": torch.randn(tiles, side**2, 3 * 16**2, generator=generator),
            "pixel_attention_mask": torch.ones(tiles, side**2, dtype=torch.long),
            "spatial_shapes": torch.tensor([[side, side]] * tiles),
        }


def _behind_attention(preset: Preset, num_layers: int) -> list[int]:
    config = preset.config(Depth(num_layers, preset.tower_layers))
    return list(family_of(config).default_layers(config, num_layers))


PRESETS: dict[str, Preset] = {
    "llava-1.5-7b": LlavaPreset(4096, 11008, 32, 32, 32, 32064, (336, 336), 24),
    "llava-1.5-13b": LlavaPreset(5120, 13824, 40, 40, 40, 32064, (336, 336), 24),
    "qwen2-vl-7b": QwenPreset(3584, 18944, 28, 28, 4, 152064, (896, 672), 32),
    "internvl-8b": InternVLPreset(3584, 18944, 28, 28, 4, 151674, (896, 896), 24, side=448),
    "gemma4-e2b": Gemma4Preset(
        1536, 6144, 35, 8, 1, 262144, (960, 672), 16, reusing_layers=20, period=5
    ),
    "qwen3.5-9b": Qwen35Preset(4096, 12288, 32, 16, 4, 248320, (1024, 768), 27),
    "lfm2-vl-1.6b": Lfm2VlPreset(2048, 12288, 16, 32, 8, 65536, (1024, 1024), 27),
    # This small shape is for trying the command out.
    "tiny": LlavaPreset(256, 688, 8, 4, 4, 1000, (336, 336), 2, tower_sizes=(64, 64, 1)),
}


def describe(model: Any) -> str:
    """A line about the shape of a model's decoder and tower."""
    text, vision = model.config.get_text_config(), model.config.vision_config
    tower = getattr(vision, "num_hidden_layers", None) or vision.depth
    return (
        f"{text.num_hidden_layers} decoder layers, hidden size {text.hidden_size}, MLP "
        f"{text.intermediate_size}, {text.num_attention_heads} heads, {tower} tower layers, "
        f"attention {text._attn_implementation}"
    )
