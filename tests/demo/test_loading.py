"""What reaches the model is what the picture shows; missing packages are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from atp_patch.errors import ConfigError
from atp_patch.loading import as_seen, load_checkpoint, read_image


class Processor:
    """As far as ``as_seen`` looks."""

    def __init__(self, **settings: object) -> None:
        plain = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
        self.image_processor = CLIPImageProcessorPil(**plain, **settings)


CROPPING = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
STRETCHING = {"size": {"height": 64, "width": 64}, "crop_size": {"height": 64, "width": 64}}


@pytest.mark.parametrize("settings", [CROPPING, STRETCHING, {**CROPPING, "do_center_crop": False}])
@pytest.mark.parametrize("size", [(64, 64), (160, 70), (50, 130)])
def test_as_seen_shows_what_the_processor_passes_on(
    settings: dict[str, object], size: tuple[int, int]
) -> None:
    width, height = size
    red = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    green = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    image = Image.fromarray(np.stack([red, green, red], -1).astype(np.uint8))
    processor = Processor(**settings)
    pixels = processor.image_processor(image, return_tensors="np")["pixel_values"][0]
    shown = as_seen(processor, image).resize((pixels.shape[2], pixels.shape[1]))
    difference = np.asarray(shown, dtype=np.float32) / 255 - pixels.transpose(1, 2, 0)
    assert np.abs(difference).mean() < 0.02


def test_an_image_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    image = Image.new("RGBA", (30, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    read = read_image(tmp_path / "turned.jpg")
    assert (read.size, read.mode) == ((20, 30), "RGB")


def test_a_package_that_a_processor_needs_is_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ImportError("\nThis needs the Spectacles library.\nSee elsewhere.")

    def accept(model: nn.Module) -> None:
        assert all(p.device.type == "meta" for p in model.parameters())

    monkeypatch.setattr(AutoProcessor, "from_pretrained", broken)
    with pytest.raises(ConfigError, match=r"Spectacles library\. Install it"):
        load_checkpoint(str(checkpoint), torch.device("cpu"), torch.float32, accept)
