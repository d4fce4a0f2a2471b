"""Writes example scenes with questions and correct answers.

`python -m workshop.gallery FOLDER` writes the first scenes of the held-out split, which are chosen
by index and not by what the model can do, and `scenes.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from atp_patch.builtin.scenes import Scene, make_scene
from atp_patch.builtin.vocabulary import TASKS

DEMO_QUESTION = "How many red shapes are there?"


def gallery(number: int, first: int = 0) -> list[Scene]:
    """Return `number` held-out scenes from index `first` on, the first of them with red shapes.

    Scenes are taken in order, except for the first one, because the demo asks about its red shapes.
    It is the first scene from index `first` on that has a sign and one or two red shapes; the model
    counts larger numbers worst.
    """
    index = first
    while True:
        scene = make_scene("test", index)
        if scene.layout.sign and sum(o.colour == "red" for o in scene.objects) in (1, 2):
            break
        index += 1
    others = [k for k in range(first, first + number) if k != index]
    return [scene, *(make_scene("test", k) for k in others[: number - 1])]


def describe(scene: Scene, file: str) -> dict[str, object]:
    """Return the JSON entry of a scene, which always includes the demo's question."""
    asked = [{"task": q.task, "question": q.text, "answer": q.answer} for q in scene.questions]
    if all(q.text != DEMO_QUESTION for q in scene.questions):
        red = sum(o.colour == "red" for o in scene.objects)
        asked.append({"task": "count", "question": DEMO_QUESTION, "answer": str(red)})
    return {"file": file, "index": scene.index, "questions": asked}


def main(arguments: list[str] | None = None) -> None:
    """Write the images and `scenes.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--number", type=int, default=16)
    parser.add_argument("--first", type=int, default=0, help="index of the first scene")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    scenes = gallery(options.number, options.first)
    missing = set(TASKS) - {q.task for scene in scenes for q in scene.questions}
    if missing:
        parser.error(f"no question of {', '.join(sorted(missing))}: ask for more scenes")
    entries = []
    for number, scene in enumerate(scenes, 1):
        file = f"{number:02d}.png"
        scene.image.save(options.folder / file)
        entries.append(describe(scene, file))
    text = json.dumps({"split": "test", "scenes": entries}, indent=1)
    (options.folder / "scenes.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
