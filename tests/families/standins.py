"""Stand-ins for models of other packages: their attributes, methods and tensor names, written anew.

What they compute is what the originals compute, as far as the tests need it. They are the sources
of synthetic checkpoints too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

IGNORE = -100


class InternVLChatConfig(PreTrainedConfig):
    model_type = "internvl_chat"

    def __init__(
        self,
        vision_config: Any = None,
        llm_config: Any = None,
        downsample_ratio: float = 0.5,
        force_image_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.vision_config, self.llm_config = vision_config, llm_config
        self.downsample_ratio, self.force_image_size = downsample_ratio, force_image_size


class _InternAttention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        self.normalized = config.qk_normalization
        if self.normalized:
            self.q_norm = nn.RMSNorm(width, eps=config.layer_norm_eps)
            self.k_norm = nn.RMSNorm(width, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.qkv(hidden).chunk(3, -1)
        if self.normalized:
            query, key = self.q_norm(query), self.k_norm(key)
        heads = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        return self.proj(scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class _InternLayer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        norm = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}[config.norm_type]
        self.attn = _InternAttention(config)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(width, config.intermediate_size)
        self.mlp.fc2 = nn.Linear(config.intermediate_size, width)
        self.norm1 = norm(width, eps=config.layer_norm_eps)
        self.norm2 = norm(width, eps=config.layer_norm_eps)
        self.ls1, self.ls2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.ls1 * self.attn(self.norm1(hidden))
        inner = nn.functional.gelu(self.mlp.fc1(self.norm2(hidden)))
        return hidden + self.ls2 * self.mlp.fc2(inner)


class _InternVision(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        count = (config.image_size // patch) ** 2
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.randn(1, 1, width))
        self.embeddings.patch_embedding = nn.Conv2d(3, width, patch, stride=patch)
        self.embeddings.position_embedding = nn.Parameter(torch.randn(1, count + 1, width))
        self.encoder = nn.Module()
        layers = (_InternLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder.layers = nn.ModuleList(layers)

    def forward(self, pixels: Tensor) -> Tensor:
        embeddings = self.embeddings
        patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        hidden = torch.cat([embeddings.class_embedding.expand(len(patches), -1, -1), patches], 1)
        hidden = hidden + embeddings.position_embedding
        for layer in self.encoder.layers:
            hidden = layer(hidden)
        return hidden


class InternVLChatModel(PreTrainedModel):
    """InternVL-2 as the code beside its checkpoints has it."""

    config_class = InternVLChatConfig
    _supports_sdpa = True

    def __init__(self, config: InternVLChatConfig) -> None:
        super().__init__(config)
        self.vision_model = _InternVision(config.vision_config)
        self.language_model = AutoModelForCausalLM.from_config(config.llm_config)
        cells = config.vision_config.hidden_size * int(1 / config.downsample_ratio) ** 2
        width = config.llm_config.hidden_size
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(cells), nn.Linear(cells, width), nn.GELU(), nn.Linear(width, width)
        )
        self.img_context_token_id: int | None = None
        self.post_init()

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        """(tiles, tokens, hidden): each token from a cell of patches, columns within rows."""
        patches = self.vision_model(pixel_values)[:, 1:]
        side, cell = round(patches.shape[1] ** 0.5), int(1 / self.config.downsample_ratio)
        grid = patches.unflatten(1, (side // cell, cell, side // cell, cell))
        return self.mlp1(grid.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2))

    def _mixed(self, input_ids: Tensor, features: Tensor | None) -> Tensor:
        embeds = self.language_model.get_input_embeddings()(input_ids).clone()
        if features is not None:
            embeds[input_ids == self.img_context_token_id] = features.flatten(0, 1)
        return embeds

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_flags: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        features = self.extract_feature(pixel_values)[image_flags.squeeze(-1) == 1]
        outputs = self.language_model(
            inputs_embeds=self._mixed(input_ids, features),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE
            )
        return CausalLMOutputWithPast(loss, outputs.logits, outputs.past_key_values)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        visual_features: Tensor | None = None,
        generation_config: Any = None,
        output_hidden_states: bool | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        assert self.img_context_token_id is not None
        features = None if pixel_values is None else self.extract_feature(pixel_values)
        return self.language_model.generate(
            inputs_embeds=self._mixed(input_ids, features),
            attention_mask=attention_mask,
            generation_config=generation_config,
            output_hidden_states=output_hidden_states,
            use_cache=True,
            **generate_kwargs,
        )


class VilaConfig(PreTrainedConfig):
    model_type = "llava_llama"

    def __init__(
        self,
        llm_cfg: Any = None,
        vision_tower_cfg: dict[str, Any] | None = None,
        mm_projector_cfg: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.llm_cfg = llm_cfg
        self.vision_tower_cfg, self.mm_projector_cfg = vision_tower_cfg, mm_projector_cfg


class VilaModel(PreTrainedModel):
    """VILA-1.5 and NVILA: ``llm``, ``_embed``, ``forward``, ``generate``."""

    config_class = VilaConfig
    _supports_sdpa = True
    media_token_id, newline_id, padding_side = 5, 9, "right"

    def __init__(self, config: VilaConfig) -> None:
        super().__init__(config)
        tower = SiglipVisionConfig(**config.vision_tower_cfg, vision_use_head=False)
        self.llm = AutoModelForCausalLM.from_config(config.llm_cfg)
        self.vision_tower = SiglipVisionModel(tower)
        width = config.llm_cfg.hidden_size
        self.mm_projector = nn.Sequential(
            nn.LayerNorm(4 * tower.hidden_size),
            nn.Linear(4 * tower.hidden_size, width),
            nn.GELU(),
            nn.Linear(width, width),
        )
        self.post_init()

    def _features(self, image: Tensor) -> Tensor:
        """(tokens + 1, hidden) of one image: 2 x 2 patches a token, and the newline's embedding."""
        patches = self.vision_tower(image[None]).last_hidden_state[0]
        side = round(len(patches) ** 0.5)
        grid = pad(patches.unflatten(0, (side, side)), (0, 0, 0, side % 2, 0, side % 2))
        cells = grid.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).transpose(1, 2)
        newline = self.llm.get_input_embeddings().weight[self.newline_id]
        return torch.cat([self.mm_projector(cells.flatten(2).flatten(0, 1)), newline[None]])

    def _embed(
        self,
        input_ids: Tensor,
        media: dict[str, list[Tensor]],
        media_config: Any = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        labels = torch.full_like(input_ids, IGNORE) if labels is None else labels
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        images = iter(media.get("image", []))
        rows = []
        for ids, targets, real in zip(input_ids, labels, mask.bool(), strict=True):
            table, known = [], []
            for token, target in zip(ids[real], targets[real], strict=True):
                text = self.llm.get_input_embeddings()(token)[None]
                image = token == self.media_token_id
                table.append(self._features(next(images)) if image else text)
                known.append(target.expand(len(table[-1])) if not image else None)
                if image:
                    known[-1] = torch.full((len(table[-1]),), IGNORE)
            rows.append((torch.cat(table), torch.cat(known)))
        longest = max(len(known) for _, known in rows)
        gaps = [longest - len(known) for _, known in rows]
        sides = [(gap, 0) if self.padding_side == "left" else (0, gap) for gap in gaps]
        embeds = [pad(x, (0, 0, *side)) for (x, _), side in zip(rows, sides, strict=True)]
        known = [pad(y, side, value=IGNORE) for (_, y), side in zip(rows, sides, strict=True)]
        real = [
            pad(torch.ones_like(y).bool(), side) for (_, y), side in zip(rows, sides, strict=True)
        ]
        return torch.stack(embeds), torch.stack(known), torch.stack(real)

    def forward(
        self,
        input_ids: Tensor | None = None,
        media: dict[str, list[Tensor]] | None = None,
        media_config: Any = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        packing: bool = True,
        **kwargs: Any,
    ) -> Any:
        embeds, labels, mask = self._embed(input_ids, media, media_config, labels, attention_mask)
        if packing and self.training:
            embeds, labels, mask = embeds[mask][None], labels[mask][None], mask[mask][None]
        return self.llm(inputs_embeds=embeds, attention_mask=mask, labels=labels, **kwargs)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor | None = None,
        media: dict[str, list[Tensor]] | None = None,
        media_config: Any = None,
        attention_mask: Tensor | None = None,
        **generation_kwargs: Any,
    ) -> Any:
        embeds, _, mask = self._embed(input_ids, media, media_config, None, attention_mask)
        return self.llm.generate(inputs_embeds=embeds, attention_mask=mask, **generation_kwargs)
