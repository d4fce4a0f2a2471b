"""Patched models in the real lmms-eval, on questions about generated scenes.

`make test-eval` installs lmms-eval into an environment of its own and runs these tests there.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import load_video

# The harness itself needs most of this time, on a machine that does other things too.
pytestmark = [pytest.mark.lmms_eval, pytest.mark.timeout(1500)]
pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: make eval-env")

from atp_patch import last_trace, patch_model  # noqa: E402
from atp_patch.builtin import make_scene  # noqa: E402
from atp_patch.contract.errors import ConfigError  # noqa: E402
from atp_patch.evaluation.command import main as evaluate  # noqa: E402
from atp_patch.integrations.lmms_eval import SimpleTasks, generation, manifest  # noqa: E402
from tests.helpers.vllm_models import export_qwen2_vl  # noqa: E402

ROOT = Path(__file__).parents[2]
TASKS, QUESTIONS = ("exist", "count"), 8
ATP = "pretrained=builtin,method=atp,target_tokens=144"
PLAIN = "pretrained=builtin,method=plain"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks for the harness."""
    path = ROOT / "examples" / "lmms_eval_tasks.py"
    spec = importlib.util.spec_from_file_location("lmms_eval_tasks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("tasks")
    module.write(folder, QUESTIONS, "test")
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """By method and task, the scores of our own evaluation of the same questions."""
    out = tmp_path_factory.mktemp("evaluation")
    asked = ["--tasks", ",".join(TASKS), "--questions", str(QUESTIONS), "--seeds", "1"]
    assert (
        evaluate([*asked, "--methods", "atp", "--budgets", "0.25", "--no-plots", "--out", str(out)])
        == 0
    )
    found = {}
    for file in (out / "runs").glob("*.jsonl"):
        first, *chunks = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        scores = {task: [] for task in TASKS}
        for chunk in chunks:
            for task in TASKS:
                scores[task] += chunk["tasks"][task]["scores"]
        found[first["identity"]["setting"]["method"]] = scores
    return found


def run(tasks, out, arguments, *options, names=TASKS, processes=1):
    """Run the harness; return its results, and by task its samples in order."""
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        str(processes),
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "-m",
    ]
    start = [sys.executable, "-m"] if processes == 1 else launch
    subprocess.run(
        [
            *start,
            "lmms_eval",
            "--include_path",
            str(tasks),
            "--model",
            "atp_patch",
            "--tasks",
            ",".join(f"atp_patch_{name}" for name in names),
            "--model_args",
            arguments,
            "--output_path",
            str(out),
            "--log_samples",
            *options,
        ],
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=tasks,
        timeout=900,
    )
    (file,) = out.rglob("*results.json")
    samples = {}
    for name in names:
        (lines,) = out.rglob(f"*samples_atp_patch_{name}.jsonl")
        rows = map(json.loads, lines.read_text(encoding="utf-8").splitlines())
        samples[name] = sorted(rows, key=lambda row: row["doc_id"])
    return json.loads(file.read_text(encoding="utf-8")), samples


def scores(samples):
    return {name: [row["exact"] for row in rows] for name, rows in samples.items()}


@pytest.mark.parametrize(
    ("arguments", "method", "batch", "processes"),
    [
        (PLAIN, "unpruned", "1", 1),
        (PLAIN, "unpruned", "8", 2),
        (ATP, "atp", "1", 1),
        (ATP, "atp", "8", 1),
        (ATP, "atp", "8", 2),
    ],
)
def test_scores_are_those_of_our_own_evaluation(
    tasks, expected, tmp_path, arguments, method, batch, processes
):
    results, samples = run(tasks, tmp_path, arguments, "--batch_size", batch, processes=processes)
    assert scores(samples) == expected[method]
    throughput = results["throughput"]
    if method == "unpruned":
        assert "avg_visual_tokens" not in throughput
        return
    assert throughput["avg_visual_tokens"] == 576
    assert throughput["avg_visual_tokens_over_layers"] == pytest.approx(144, abs=1)
    assert throughput["avg_kv_megabytes"] < throughput["avg_kv_megabytes_plain"] / 3
    counts = samples["exist"][0]["token_counts"][0]
    assert counts["visual_tokens"] == 576
    assert counts["average_visual_tokens"] == pytest.approx(144, abs=1)


@pytest.mark.parametrize(
    "asked",
    [
        "method=downsample,keep=0.3",  # the picture
        "method=prumerge+,keep=0.3",  # the tower
        "method=divprune,keep=0.3",  # the door
        "method=divprune/fastv,keep=0.3",  # the door, then a layer
        "weights=voco8",
    ],
)
def test_every_kind_of_method_answers(tasks, tmp_path, asked):
    arguments = f"pretrained=builtin,{asked}"
    results, samples = run(tasks, tmp_path, arguments, "--limit", "2", names=("exist",))
    assert results["throughput"]["avg_visual_tokens_over_layers"] < 0.35 * 576
    assert {row["filtered_resps"] for row in samples["exist"]} <= {"yes", "no"}


def test_limit_and_a_second_run_from_the_cache_of_answers(tasks, expected, tmp_path):
    cache = ("--use_cache", str(tmp_path / "cache"), "--limit", "3", "--batch_size", "2")
    _, first = run(tasks, tmp_path / "first", ATP, *cache)
    assert scores(first) == {name: rows[:3] for name, rows in expected["atp"].items()}
    results, second = run(tasks, tmp_path / "second", ATP, *cache)
    assert scores(second) == scores(first)
    assert results["throughput"]["total_gen_tokens"] == 0  # every answer came from the cache


def test_multiple_choice_compares_probabilities(tasks, expected, tmp_path):
    results, samples = run(
        tasks, tmp_path, ATP, "--batch_size", "4", "--force_simple", names=("choice",)
    )
    right = [row["acc"] for row in samples["choice"]]
    assert right == expected["atp"]["exist"]  # a right greedy answer is the likelier of the two
    assert results["throughput"]["avg_visual_tokens"] == 576


MEDIA = """
from PIL import Image


def doc_to_visual(doc):
    pictures = [Image.open(path).convert("RGB") for path in doc["pictures"]]
    return pictures or [doc["video"]]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    return {"exact": 1.0}
"""


def write_video(path, frames):
    """Write pictures as a video of one frame a second."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height = frames[0].size
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def test_videos_and_several_pictures_are_answered_as_by_generate(tmp_path):
    folder = export_qwen2_vl(tmp_path / "model")
    template = folder / "chat_template.jinja"
    text = "{% elif part['type'] == 'text' %}"
    video = "{% elif part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    template.write_text(template.read_text().replace(text, video + text))
    scenes = [make_scene("test", number) for number in range(6)]
    pictures = [str(tmp_path / f"{number}.png") for number in range(2)]
    for path, scene in zip(pictures, scenes, strict=False):
        scene.image.save(path)
    film = str(tmp_path / "film.mp4")
    write_video(film, [scene.image for scene in scenes])
    question = scenes[0].questions[0].text
    docs = [
        {"pictures": pictures, "video": "", "question": question, "answer": ""},
        {"pictures": [], "video": film, "question": question, "answer": ""},
    ]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "docs.json").write_text(json.dumps(docs))
    (tasks / "utils.py").write_text(MEDIA)
    (tasks / "media.yaml").write_text(
        "task: atp_patch_media\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tasks / 'docs.json'}}}}}\n"
        "test_split: test\n"
        "output_type: generate_until\n"
        "doc_to_visual: !function utils.doc_to_visual\n"
        "doc_to_text: !function utils.doc_to_text\n"
        "doc_to_target: answer\n"
        "process_results: !function utils.process_results\n"
        "generation_kwargs: {max_new_tokens: 6, temperature: 0}\n"
        "metric_list: [{metric: exact, aggregation: mean, higher_is_better: true}]\n"
    )
    arguments = f"pretrained={folder},method=divprune,keep=0.5,num_frames=4,dtype=float32"
    _, samples = run(tasks, tmp_path / "out", arguments, names=("media",))

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    patch_model(model, method="divprune", keep=0.5)
    frames, _ = load_video(film, backend="pyav")
    media = [
        [{"type": "image", "image": Image.open(path).convert("RGB")} for path in pictures],
        [{"type": "video", "video": frames[[0, 2, 3, 5]]}],  # four of six
    ]
    for row, content in zip(samples["media"], media, strict=True):
        chat = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        inputs = processor.apply_chat_template(
            chat,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        assert row["filtered_resps"] == processor.tokenizer.decode(new, skip_special_tokens=True)
        total, average = last_trace(model).layout.totals[0], last_trace(model).average_tokens
        assert row["token_counts"][0]["visual_tokens"] == total
        assert average == pytest.approx(total / 2, abs=1)


def test_the_harness_finds_the_model_by_its_entry_point():
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.load_entrypoint_manifests()
    for simple in (False, True):
        found = registry.get_model_class("atp_patch", force_simple=simple)
        assert found.is_simple is simple
    assert manifest().model_id == "atp_patch"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"do_sample": False}),
        ({"temperature": 0, "top_p": 0.9}, {"do_sample": False}),
        ({"temperature": 0.7}, {"do_sample": True, "temperature": 0.7}),
        ({"num_beams": 3, "image_aspect_ratio": "pad"}, {"do_sample": False, "num_beams": 3}),
    ],
)
def test_generation_arguments_are_those_of_the_task(given, expected):
    how = generation({**given, "max_new_tokens": 7, "until": ["\n\n"]})
    assert (how.max_new_tokens, how.stop) == (7, ("\n\n",))
    assert {k: v for k, v in how.options.items() if v is not None} == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": "auto"}, "batch_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"method": "plain", "keep": 0.5}, "leave out keep"),
        ({"weights": "atp25", "method": "atp"}, "leave out method"),
        ({"layers": "4+x"}, "layers"),
        ({"num_frames": 8, "fps": 2}, "one of num_frames and fps"),
    ],
)
def test_wrong_model_arguments_are_refused_before_the_model_loads(arguments, message):
    with pytest.raises(ConfigError, match=message):
        SimpleTasks("builtin", **arguments)


def test_the_harness_has_the_tasks_and_the_metrics_of_the_recipes():
    from lmms_eval.tasks import TaskManager

    tables = yaml.safe_load((ROOT / "results/large/tables.yaml").read_text(encoding="utf-8"))
    known = TaskManager().task_index
    for task, metric in {k: v for few in tables["tasks"].values() for k, v in few.items()}.items():
        assert task in known
        near = Path(known[task]["yaml_path"]).parent.rglob("*yaml")
        named = [re.search(rf"metric: *{metric}\s", file.read_text("utf-8")) for file in near]
        assert any(named), (task, metric)


def test_the_table_reads_what_the_harness_writes_of_a_group(tasks, tmp_path, monkeypatch):
    """The group has no score of its own, as MVBench in lmms-eval."""
    names = [f"atp_patch_{name}" for name in TASKS]
    (tasks / "_pair.yaml").write_text(yaml.safe_dump({"group": "atp_patch_pair", "task": names}))
    both = ("--limit", "2", "--tasks", "atp_patch_pair")
    _, samples = run(tasks, tmp_path, PLAIN, *both)
    monkeypatch.syspath_prepend(str(ROOT / "results" / "large"))
    table = importlib.import_module("table")
    found = [one for rows in scores(samples).values() for one in rows]
    assert table.scores(tmp_path, {"atp_patch_pair": "exact"}) == {
        "atp_patch_pair": sum(found) / len(found)
    }


def test_the_dry_run_of_the_recipes_makes_a_table_and_goes_on(tmp_path):
    large, env = ROOT / "results" / "large", {**os.environ, "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, str(large / "run.py"), "dry-run", "--methods", "atp"]
    line += ["--limit", "2", "--out", str(tmp_path)]
    subprocess.run(line, check=True, env=env, timeout=900)
    again = subprocess.run(line, check=True, env=env, timeout=60, capture_output=True, text=True)
    assert again.stdout.count("done before") == 2
    show = [sys.executable, str(large / "table.py"), "dry-run", "--methods", "atp"]
    shown = subprocess.run(
        [*show, "--out", str(tmp_path)], check=True, capture_output=True, text=True, cwd=large
    )
    rows = shown.stdout.splitlines()
    assert rows[2].startswith("| plain | - | - |")
    assert rows[3].startswith("| atp | 144 | 143.9 |")
