"""A stranger's path: the commands of the README alone lead to an adapter on the Hub, and a fresh
process that loads it gives the same answers.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch

import atp_patch
from atp_patch import load_trained
from atp_patch.builtin import load_builtin
from tests.helpers.hub import LoopbackHub
from tests.hub.conftest import TOKEN

ROOT = Path(__file__).parents[2]
# What is added to a command of the README, so that the test takes seconds: the last flag wins.
SHORT = ["--steps", "1", "--samples", "4", "--batch-size", "2", "--calibrate", "0"]
ANSWERS = """
import json
import torch
torch.set_num_threads(1)
from atp_patch.builtin import make_scene, prompt
scene = make_scene("test", 0)
asked = [processor(images=scene.image, text=prompt(q.text), return_tensors="pt")
         for q in scene.questions[:2]]
with torch.no_grad():
    logits = [model(**inputs).logits[0, -1].tolist() for inputs in asked]
kept = atp_patch.last_trace(model).tokens_per_layer[0].tolist()
print(json.dumps({"logits": logits, "kept": kept}))
"""


def commands() -> list[list[str]]:
    """The command lines of the README's section on training and sharing, with a user's name."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## Train, share, load\n\n```sh\n(.*?)```", page, re.DOTALL)
    assert block is not None
    return [shlex.split(line.replace("USER", "ann")) for line in block[1].splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_from_the_readme_to_the_hub_and_back(hub: LoopbackHub, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }
    (tmp_path / "examples").symlink_to(ROOT / "examples")

    def run(*argv: str) -> str:
        done = subprocess.run(
            [sys.executable, *argv],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    train, push, demo = commands()
    assert [train[:2], push[:2], demo[:2]] == [["atp-patch", n] for n in ("train", "push", "demo")]
    run("-m", "atp_patch", *train[1:], *SHORT)
    run("-m", "atp_patch", *push[1:])
    assert set(hub.files("ann/my-adapter")) >= {"atp_config.json", "atp_model.safetensors"}
    answer = json.loads(run("-m", "atp_patch", *demo[1:], "--json"))
    card = hub.files("ann/my-adapter")["README.md"].decode()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    assert '"ann/my-adapter"' in code[1]
    fresh = json.loads(run("-c", code[1] + ANSWERS))
    model, processor = load_builtin()
    load_trained(model, str(tmp_path / "training"))
    names = {"model": model, "processor": processor, "atp_patch": atp_patch}
    with redirect_stdout(StringIO()) as told:
        exec(ANSWERS, names)
    here = json.loads(told.getvalue())
    assert fresh["kept"] == here["kept"]
    assert torch.equal(torch.tensor(fresh["logits"]), torch.tensor(here["logits"]))
    assert min(here["kept"]) < max(here["kept"]) == answer["visual_tokens"]
