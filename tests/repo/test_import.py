"""Importing the package changes nothing, and the package says the same of itself everywhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import atp_patch

ROOT = Path(__file__).parents[2]

SNAPSHOT = """
import inspect, logging, sys, warnings
import torch
import transformers.cache_utils, transformers.masking_utils, transformers.modeling_utils
import transformers.generation.utils
from transformers.models.clip import modeling_clip
from transformers.models.llama import modeling_llama
from transformers.models.llava import modeling_llava
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl

def snapshot():
    modules = [m for name, m in sys.modules.items() if name.startswith("transformers.")]
    modules += [torch, torch.nn, torch.nn.functional, torch.nn.modules.module]
    seen = {}
    for module in modules:
        for name, value in list(vars(module).items()):
            seen[module.__name__, name] = id(value)
            if inspect.isclass(value):
                for key, entry in list(vars(value).items()):
                    seen[module.__name__, name, key] = id(entry)
    seen["attention"] = sorted(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS)
    seen["masks"] = sorted(transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS)
    caches = transformers.cache_utils
    seen["static"] = sorted(caches.STATIC_LAYER_TYPE_MAPPING.items(), key=str)
    seen["dynamic"] = sorted(caches.DYNAMIC_LAYER_TYPE_MAPPING.items(), key=str)
    for name, table in vars(torch.nn.modules.module).items():
        if "hooks" in name and hasattr(table, "items"):
            seen["hooks", name] = [(key, id(hook)) for key, hook in table.items()]
    seen["torch"] = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    seen["filters"] = list(warnings.filters)
    seen["loggers"] = [logging.getLogger().level, logging.getLogger("transformers").level]
    return seen

before = snapshot()
import atp_patch
for name in atp_patch.__all__:
    getattr(atp_patch, name)  # each loads the module that it is in
after = snapshot()
# Modules loaded lazily for the first time are no change; what was there must be as it was.
changed = {k for k, v in before.items() if after.get(k) != v and "_cache" not in str(k[-1])}
print(sorted(map(str, changed)))
"""


def test_importing_the_package_changes_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SNAPSHOT], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_installed_version_is_the_package_s() -> None:
    try:
        installed = version("atp-patch")
    except PackageNotFoundError:
        pytest.skip("run from a checkout that is not installed")
    assert installed == atp_patch.__version__


def table(page: str, title: str) -> list[str]:
    """First cells of the table under a heading of a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = text.split(f"# {title}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \|", section, re.MULTILINE)
    return rows[1:]


def test_the_pages_name_what_there_is() -> None:
    named = set(re.findall(r"`(\w+)\(", " ".join(table("api.md", "Reference"))))
    assert named <= set(atp_patch.__all__)
    functions = {n for n in atp_patch.__all__ if n[0].islower() and callable(getattr(atp_patch, n))}
    assert functions <= named
    kept = table("methods.md", "What each keeps")
    assert [cell.strip("`") for cell in kept] == atp_patch.available_methods()


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: atp_patch\.(\w+)$", page, re.MULTILINE)
    assert sorted(shown) == sorted(set(atp_patch.__all__) - {"__version__"})


def test_every_public_name_is_there() -> None:
    assert all(hasattr(atp_patch, name) for name in atp_patch.__all__)


def loaded_by(code: str, beside: str = "") -> set[str]:
    """The modules that a fresh interpreter loads for some code, beyond those of other code."""
    lines = ("import sys", beside, "before = set(sys.modules)", code)
    script = "\n".join([*lines, "print(*sorted(set(sys.modules) - before))"])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def heads(modules: set[str], depth: int = 1) -> set[str]:
    """The first parts of dotted names."""
    return {".".join(module.split(".")[:depth]) for module in modules}


def test_importing_the_package_loads_nothing_else() -> None:
    assert loaded_by("import atp_patch") >= {"atp_patch"}
    assert not heads(loaded_by("import atp_patch")) & {"torch", "transformers", "numpy"}
    ours = {"atp_patch", "atp_patch.lazy", "atp_patch.version"}
    beside = "import torch, transformers"
    assert loaded_by("import atp_patch; dir(atp_patch)", beside) == ours


def test_patching_loads_what_patching_needs() -> None:
    """A model comes from ``PreTrainedModel``; what that loads was there before."""
    beside = "from transformers import PreTrainedModel"
    found = loaded_by("import atp_patch; atp_patch.patch_model", beside)
    rooms = {"contract", "families", "lazy", "maths", "methods", "patching", "seam", "version"}
    ours = {name for name in found if name.startswith("atp_patch.")}
    assert heads(ours, 2) == {f"atp_patch.{room}" for room in rooms}
    assert not heads(found) & {"accelerate", "matplotlib", "peft", "rich"}
    assert "transformers.models" not in heads(found, 2)


def test_the_usage_needs_no_torch() -> None:
    for argument in ("--help", "--version", "no-such-command"):
        found = loaded_by(f"from atp_patch.commands.cli import main; main([{argument!r}])")
        assert not heads(found) & {"torch", "transformers", "numpy", "PIL"}


def test_help_of_a_command_needs_no_torch() -> None:
    """Which takes seconds to load; without it help is printed in a tenth of one."""
    found = loaded_by(
        "from atp_patch.commands.cli import COMMANDS, main\n"
        "from atp_patch import demo, evaluate, evidence, train\n"
        "from contextlib import redirect_stdout\nfrom io import StringIO\n"
        "with redirect_stdout(StringIO()):\n"
        "    assert {main([name, '--help']) for name in COMMANDS} == {0}\n"
        "    assert {each.main(['-h']) for each in (demo, evaluate, evidence, train)} == {0}"
    )
    assert not heads(found) & {"torch", "transformers", "matplotlib", "peft", "rich", "PIL"}


def test_type_checkers_and_python_are_told_the_same_names() -> None:
    tree = ast.parse((ROOT / "atp_patch" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    read = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(read) == set(atp_patch.__all__) - {"__version__"}
    for name, home in read.items():
        assert home is not None
        assert getattr(atp_patch, name) is getattr(import_module(home), name)
    with pytest.raises(AttributeError, match="no attribute 'patch_modle'"):
        _ = atp_patch.patch_modle
