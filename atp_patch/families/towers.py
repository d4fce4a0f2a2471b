"""Vision towers as families describe them: where their attention, blocks and projector are."""

from __future__ import annotations

from typing import Any

from atp_patch.contract import Tower
from atp_patch.contract.errors import UnsupportedModelError

_PROJECTOR = "multi_modal_projector"


def feature_block(config: Any, *names: str) -> int:
    """Return the number of the tower's block whose output the model uses; of several the deepest.

    Args:
        config: the config of the whole model.
        names: the attributes of the config that may say so; the first that exists counts.

    Raises:
        UnsupportedModelError: where the model uses the input of the first block.
    """
    chosen = next(getattr(config, name) for name in names if hasattr(config, name))
    depth = int(config.vision_config.num_hidden_layers)
    layers = [chosen] if isinstance(chosen, int) else list(chosen)
    block = max(layer + depth if layer < 0 else layer - 1 for layer in layers)
    if not 0 <= block < depth:
        raise UnsupportedModelError(
            f"the model uses layer {chosen} of a vision tower of {depth} blocks, and no attention "
            "led to it; use a method that prunes inside the decoder."
        )
    return block


def square_tower(config: Any, *modules: str, packers: tuple[str, ...] = ()) -> Tower | None:
    """Return a CLIP or SigLIP tower whose projector works token by token, or None for other towers.

    A tower for videos hands on the class token of every frame; others do so under the strategy
    "full".

    Args:
        config: the config of the whole model.
        modules: the names of the towers in the model without its head; by default "vision_tower".
        packers: the methods that put the projector's features together, cut or shrink them, if
            there are any.
    """
    vision = config.vision_config
    kind = str(vision.model_type)
    if not kind.startswith(("clip", "siglip_")):
        return None
    modules = modules or ("vision_tower",)
    classes = kind.startswith("clip")
    full = getattr(config, "vision_feature_select_strategy", "default") == "full"
    return Tower(
        modules=modules,
        blocks="encoder.layers",
        block=feature_block(config, "vision_feature_layer", "vision_feature_layers"),
        projector=_PROJECTOR,
        class_token=classes,
        lead=tuple(int(classes and (full or name == "video_tower")) for name in modules),
        resized="interpolate_pos_encoding",
        whole=not packers,
        packers=packers,
        patch=int(vision.patch_size),
    )


def siglip_cells(config: Any, cell: int, **more: Any) -> Tower | None:
    """Return a SigLIP tower whose projector joins cells of patches, or None for other towers.

    Args:
        config: the config of the whole model.
        cell: how many patches lie along a side of a cell.
        more: further facts about the tower.
    """
    vision = config.vision_config
    if not str(vision.model_type).startswith("siglip_"):
        return None
    chosen = hasattr(config, "vision_feature_layer")
    facts: dict[str, Any] = {
        "modules": ("vision_tower",),
        "blocks": "encoder.layers",
        "block": feature_block(config, "vision_feature_layer") if chosen else last_block(config),
        "projector": _PROJECTOR,
        "tokenwise": False,
        "cell": cell,
        "patch": int(vision.patch_size),
        "square": True,
    }
    return Tower(**{**facts, **more})


def pixtral_tower(config: Any, **names: str) -> Tower:
    """Return Pixtral's tower, which takes all pictures in one row, and their sizes in pixels.

    Methods may read it.

    Args:
        config: the config of the whole model.
        names: the names of its module and projector, where they are not LLaVA's.
    """
    chosen = hasattr(config, "vision_feature_layer")
    patch = int(config.vision_config.patch_size)
    return Tower(
        modules=(names.get("module", "vision_tower"),),
        blocks="transformer.layers",
        attention="attention",
        block=feature_block(config, "vision_feature_layer") if chosen else last_block(config),
        projector=names.get("projector", _PROJECTOR),
        mergeable=False,
        tokenwise=False,
        packed=True,
        by_rows=True,
        cell=int(getattr(config, "spatial_merge_size", 1)),
        patch=patch,
        sizes="image_sizes",
        sizes_step=patch,
    )


def naflex_tower(config: Any) -> Tower | None:
    """Return SigLIP 2's tower for pictures of any size (NaFlex), which methods may read, or
    None.
    """
    if config.vision_config.model_type != "siglip2_vision_model":
        return None
    return Tower(
        modules=("vision_tower",),
        blocks="encoder.layers",
        block=last_block(config),
        projector=_PROJECTOR,
        mergeable=False,
        tokenwise=False,
        by_rows=True,
        cell=int(config.downsample_factor),
        patch=int(config.vision_config.patch_size),
        sizes="spatial_shapes",
    )


def last_block(config: Any) -> int:
    """Return the number of the tower's last block."""
    return int(config.vision_config.num_hidden_layers) - 1


def shuffled_tower(config: Any) -> Tower:
    """Return InternVL's tower, which has a class token and joins cells of patches before the
    projector.

    Qianfan-OCR's holds its blocks by another name.
    """
    vision = config.vision_config
    size = vision.patch_size
    return Tower(
        modules=("vision_tower",),
        blocks="layers" if config.model_type == "qianfan_ocr" else "encoder.layer",
        attention="attention",
        block=feature_block(config, "vision_feature_layer"),
        projector=_PROJECTOR,
        tokenwise=False,
        class_token=True,
        cell=round(1 / config.downsample_ratio),
        patch=int(size if isinstance(size, int) else size[0]),
        square=True,
    )


def packed_tower(config: Any, *, mergeable: bool = True) -> Tower:
    """Return the tower of Qwen2-VL and Qwen2.5-VL, which takes all images in one row.

    Its merger joins cells of patches. In a tower with windows the last block without windows
    counts.

    Args:
        config: the config of the whole model.
        mergeable: whether methods may merge its tokens.
    """
    vision = config.vision_config
    cell, patch = int(vision.spatial_merge_size), int(vision.patch_size)
    full = getattr(vision, "fullatt_block_indexes", None)
    return Tower(
        modules=("visual",),
        blocks="blocks",
        attention="attn",
        block=int(vision.depth) - 1 if full is None else max(full),
        projector="visual.merger",
        mergeable=mergeable,
        tokenwise=False,
        packed=True,
        cell=cell,
        window=0 if full is None else int(vision.window_size) // patch // cell,
        full_blocks=() if full is None else tuple(full),
        patch=patch,
        frames=int(vision.temporal_patch_size),
    )


def read_tower(config: Any, **facts: Any) -> Tower:
    """Return a tower that methods may read and not merge.

    It takes all images in one row, cell by cell, if ``facts`` say nothing else.

    Args:
        config: the config of the whole model.
        facts: further facts about the tower, which override those.
    """
    vision = config.vision_config
    size = vision.patch_size
    given: dict[str, Any] = {
        "modules": ("vision_tower",),
        "blocks": "layers",
        "projector": _PROJECTOR,
        "mergeable": False,
        "tokenwise": False,
        "packed": True,
        "patch": int(size if isinstance(size, int) else size[0]),
    }
    if "block" not in facts:
        given["block"] = last_block(config)
    return Tower(**{**given, **facts})


def mixed_tower(config: Any, **facts: Any) -> Tower | None:
    """Return a tower whose layer types say which blocks attend to whole pictures, or None if none
    does.

    Args:
        config: the config of the whole model.
        facts: as of :func:`read_tower`.
    """
    types = config.vision_config.layer_types
    full = tuple(number for number, kind in enumerate(types) if kind == "full_attention")
    return read_tower(config, block=full[-1], full_blocks=full, **facts) if full else None
