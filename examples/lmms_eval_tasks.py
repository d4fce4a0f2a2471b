#!/usr/bin/env python3
"""Write questions about generated pictures as tasks of lmms-eval, which needs no network for them.

    python examples/lmms_eval_tasks.py tasks --questions 50
    python -m lmms_eval --include_path tasks --tasks atp_patch_scenes \
        --model atp_patch --model_args pretrained=builtin,method=atp,target_tokens=144

The questions are those of `python -m atp_patch.evaluate`, in the same order. The folder has one
task for each kind of question, "atp_patch_exist" and so on, and the group of all of them. The task
"atp_patch_choice" asks the questions with two answers as multiple choice: the harness compares the
probabilities of both answers.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import yaml
from datasets import Dataset, Features, Image, Value

from atp_patch.evaluation import scenes as _scenes  # noqa: F401  (registers the built-in tasks)
from atp_patch.evaluation.tasks import Task, choose_tasks

GROUP = "atp_patch_scenes"
CHOICES = ["no", "yes"]
UTILS = '''"""How lmms-eval reads the questions of this folder."""


def doc_to_visual(doc):
    """The picture of a question."""
    return [doc["image"].convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    """The text of a question."""
    return doc["question"]


def process_results(doc, results):
    """1 where the answer is exactly the true one."""
    return {"exact": float(results[0].strip() == doc["answer"].strip())}


def doc_to_choice(doc):
    """The answers among which a question chooses."""
    return ["no", "yes"]


def doc_to_target(doc):
    """The number of the true one."""
    return doc_to_choice(doc).index(doc["answer"])
'''


class Function(str):
    """The name of a function of ``utils.py``, which the harness looks up by the tag !function."""


class _Dumper(yaml.SafeDumper):
    """Writes that tag."""


_Dumper.add_representer(
    Function, lambda dumper, name: dumper.represent_scalar("!function", str(name), style="")
)


def main() -> None:
    """Write the folder."""
    parse = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parse.add_argument("folder", type=Path)
    parse.add_argument("--questions", type=int, default=50, help="of each task (default: 50)")
    parse.add_argument("--split", default="test", choices=["development", "test"])
    given = parse.parse_args()
    names = write(given.folder.resolve(), given.questions, given.split)
    print(f"wrote {', '.join(names)} and the group {GROUP} to {given.folder}")


def write(folder: Path, questions: int, split: str) -> list[str]:
    """Write one task for each kind of question, their group, and the multiple choice.

    Returns:
        the names of the tasks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "utils.py").write_text(UTILS, encoding="utf-8")
    names = []
    for task in choose_tasks(["builtin"]):
        name = f"atp_patch_{task.name}"
        data = _write_questions(folder / f"{name}.parquet", task, questions, split)
        settings = {
            "output_type": "generate_until",
            "doc_to_target": "answer",
            "process_results": Function("utils.process_results"),
            "generation_kwargs": {"max_new_tokens": 16, "temperature": 0},
            "metric_list": [{"metric": "exact", "aggregation": "mean", "higher_is_better": True}],
        }
        _write_task(folder, name, data, settings)
        names.append(name)
        if task.name == "exist":
            settings = {
                "output_type": "multiple_choice",
                "doc_to_choice": Function("utils.doc_to_choice"),
                "doc_to_target": Function("utils.doc_to_target"),
                "target_delimiter": "",
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            }
            _write_task(folder, "atp_patch_choice", data, settings)
    group = {
        "group": GROUP,
        "task": names,
        "aggregate_metric_list": [{"metric": "exact", "aggregation": "mean"}],
    }
    _write_yaml(folder / "_group.yaml", group)
    return [*names, "atp_patch_choice"]


def _write_questions(path: Path, task: Task, questions: int, split: str) -> Path:
    rows = [
        {
            "image": {"bytes": _png(task, split, example.number), "path": None},
            "question": example.question,
            "answer": example.answer,
        }
        for example in task.examples(split, questions)
    ]
    features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(path)
    return path


def _png(task: Task, split: str, number: int) -> bytes:
    stream = io.BytesIO()
    task.image(split, number).save(stream, format="PNG")
    return stream.getvalue()


def _write_task(folder: Path, name: str, data: Path, settings: dict[str, object]) -> None:
    task = {
        "task": name,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_visual": Function("utils.doc_to_visual"),
        "doc_to_text": Function("utils.doc_to_text"),
        **settings,
    }
    _write_yaml(folder / f"{name}.yaml", task)


def _write_yaml(path: Path, content: dict[str, object]) -> None:
    path.write_text(yaml.dump(content, Dumper=_Dumper, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()
