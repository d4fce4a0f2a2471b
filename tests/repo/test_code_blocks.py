"""Every block of code on the pages does what it says: Python runs, command lines are taken."""

from __future__ import annotations

import re
import shlex
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import atp_patch
from atp_patch.builtin import load_builtin, prompt
from atp_patch.commands.cli import COMMANDS
from atp_patch.integrations.vllm.settings import VARIABLE, Settings
from tests.helpers.copies import Template
from tests.helpers.hub import LoopbackHub
from tests.hub.conftest import hub as hub
from tests.repo.code_blocks import ROOT, blocks, commands, faults, inline, pages

USER = "USER"  # who publishes on the pages
# Pages whose blocks another test runs, with a model or a server of its own.
ELSEWHERE = {
    "add_method.md": "tests/core/test_methods_page.py",
    "serve.md": "tests/integrations/test_serve_process.py",
}
# How many blocks of a page are only checked, because nothing here could run them.
NOT_RUN: dict[str, int] = {}
# Options of other programs' command lines: lmms-eval's and vLLM's.
OTHERS = {"--model_args", "--limit", "--use_cache", "--log_samples", "--force_simple"} | {
    "--mm-processor-kwargs",
    "--enable-mm-embeds",
    "--enable-dbo",
}
FILES = re.compile(r"(?:atp_patch|docs|examples|results|tests|workshop)/[\w./+-]+")
RUN = [page for page in pages() if any(b.runs for b in blocks(page, "python"))]


@pytest.fixture(scope="module")
def built_in() -> tuple[Template, Any]:
    """The built-in model to copy, frozen, so that only what a patch adds learns; its processor."""
    model, processor = load_builtin()
    return Template(model.requires_grad_(False)), processor


@pytest.fixture
def reader(
    hub: LoopbackHub,
    built_in: tuple[Template, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """What a reader of any page has: a patched model, its inputs, a picture, the folder of a
    training, and a token for the Hub.

    The built-in model stands in for published checkpoints: it is a LLaVA with 32 layers and 576
    visual tokens an image.
    """
    model, processor = built_in[0].copy(), built_in[1]
    for loader, stand_in in ((AutoModelForImageTextToText, model), (AutoProcessor, processor)):
        monkeypatch.setattr(loader, "from_pretrained", lambda name, _it=stand_in, **_: _it)
    scene = ROOT / "examples" / "scenes" / "01.png"
    image = Image.open(scene).convert("RGB")
    image.save(tmp_path / "photo.jpg")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shutil.copytree(ROOT / "atp_patch/builtin/adapters/atp25", tmp_path / "training")
    hub.users["hf_user"] = (USER, True)
    monkeypatch.setenv("HF_TOKEN", "hf_user")
    monkeypatch.chdir(tmp_path)
    asked = prompt("How many red shapes are there?") + " 1"
    inputs = processor(images=image, text=asked, return_tensors="pt")
    batch = {**inputs, "labels": inputs["input_ids"].clone()}
    length = 2 + 576 + 8
    visual = torch.zeros(2, length, dtype=torch.bool)
    visual[:, 2:-8] = True
    atp_patch.patch_model(model, layers=[4, 14, 24])
    return {
        "atp_patch": atp_patch,
        "model": model,
        "processor": processor,
        "image": image,
        "batches": [dict(inputs)],
        "loader": [batch],
        "accelerator": Accelerator(cpu=True),
        "embeds": torch.randn(2, length, model.config.text_config.hidden_size),
        "attention_mask": torch.ones(2, length, dtype=torch.long),
        "visual_mask": visual,
    }


@pytest.mark.parametrize(
    "page", [p for p in RUN if p.name not in ELSEWHERE], ids=lambda page: page.name
)
def test_python_runs(page: Path, reader: dict[str, Any]) -> None:
    for number, block in enumerate(b for b in blocks(page, "python") if b.runs):
        exec(compile(block.source, f"{page.name}, block {number}", "exec"), reader)


def test_what_is_not_run_is_counted_and_has_no_fault() -> None:
    marked = {page.name: [b for b in blocks(page, "python") if not b.runs] for page in pages()}
    assert {name: len(found) for name, found in marked.items() if found} == NOT_RUN
    assert not [fault for found in marked.values() for b in found for fault in faults(b.source)]


def test_faults_are_found() -> None:
    source = (
        "import atp_patch\nfrom atp_patch import patch_models\natp_patch.calibrate(m, tokens=1)"
    )
    assert faults(source) == [
        "atp_patch has no patch_models",
        "atp_patch.calibrate takes no tokens",
    ]
    assert faults("import atp_patch\natp_patch.calibrated(1)") == [
        "atp_patch.calibrated does not exist"
    ]
    assert not faults("import atp_patch\natp_patch.patch_model(m, anything=1)\nother(x=1)")
    with pytest.raises(SyntaxError):
        faults("patch model")


def check_command(line: str) -> None:
    """Hold a command line to the parser, the file or the target that it calls."""
    words = shlex.split(line)
    if words[0].startswith(f"{VARIABLE}="):
        Settings.parse(words.pop(0).partition("=")[2])
    if words[0].startswith("PYTHONPATH="):
        words.pop(0)
    name = Path(words[0]).name
    if words[:2] == ["python", "-m"] and words[2].startswith("atp_patch."):
        name, words = "atp-patch", ["atp-patch", words[2].partition(".")[2], *words[3:]]
    if name == "atp-patch":
        parser = import_module(COMMANDS[words[1]].options).parser(f"atp-patch {words[1]}")
        parser.parse_args(words[2:])
    elif name == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), line
    elif name == "python" and words[1] == "-m":
        ours = ROOT / words[2].replace(".", "/")
        others = ("lmms_eval", "vllm.entrypoints.openai.api_server")
        assert words[2] in others or ours.with_suffix(".py").is_file(), line
    elif name == "python":
        assert (ROOT / words[1]).is_file(), line
    elif "/" in words[0]:
        assert (ROOT / words[0]).is_file(), line
    elif name == "pip":
        extras = re.findall(r"\[([\w,-]+)\]", line)
        known = (ROOT / "setup.cfg").read_text(encoding="utf-8").partition("extras_require]")[2]
        for extra in ",".join(extras).split(",") if extras else ():
            assert re.search(rf"^{extra} =", known, re.MULTILINE), line
    else:
        assert name in {"git", "hf", "vllm"}, f"no test knows this command: {line}"


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_command_lines_are_taken(page: Path) -> None:
    for line in commands(page):
        try:
            check_command(line)
        except SystemExit:
            pytest.fail(f"{page.name}: {line}")


def options() -> set[str]:
    """The options of all our commands, and of the programs in `examples` and `results`."""
    parsers = [import_module(command.options).parser("atp-patch") for command in COMMANDS.values()]
    programs = [*ROOT.glob("examples/*.py"), *ROOT.glob("results/*.py")]
    sources = [program.read_text(encoding="utf-8") for program in programs]
    added = {name for text in sources for name in re.findall(r'add_argument\(\s*"(--.+?)"', text)}
    return added | {name for each in parsers for a in each._actions for name in a.option_strings}


def test_what_sentences_name_is_there() -> None:
    known = options() | OTHERS
    for page in pages():
        for code in inline(page):
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
                assert option in known, f"{page.name}: {option}"
            if FILES.fullmatch(code):
                assert (ROOT / code).exists(), f"{page.name}: {code}"
            if name := re.match(r"atp_patch\.(\w+)\b(?!/)", code):
                there = hasattr(atp_patch, name[1]) or (ROOT / "atp_patch" / name[1]).exists()
                assert there or (ROOT / f"atp_patch/{name[1]}.py").is_file(), f"{page.name}: {code}"
