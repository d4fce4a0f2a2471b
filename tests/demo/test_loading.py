"""Images are read as they are meant; what a checkpoint needs is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoProcessor

from atp_patch.contract.errors import ConfigError
from atp_patch.tools.loading import load_checkpoint
from atp_patch.tools.pictures import read_image


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
