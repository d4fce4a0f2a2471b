"""Trains a built-in model to answer from what a method keeps of an image.

    python -m workshop.train_compressed --method voco --option num_tokens=8 --out runs/voco8
    python -m workshop.train_compressed --method prumerge+ --keep 0.1 --out runs/prumerge
    python -m workshop.train_compressed --model builtin-dynamic --method voco --out runs/dynamic

These methods do not depend on the question. So each step reads an image once and answers all its
questions with the small cache that results; gradients flow back through the cache. The model's own
forward is used, without the decoder layers that add nothing, unless these are trained too
(`--learn decoder`). `--resume` continues from the checkpoint in `--out`.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import atp_patch
from atp_patch.builtin import DYNAMIC, NAMES, TASKS, load_builtin
from atp_patch.builtin.silent import silent_layers, without
from atp_patch.patching.adapter_card import Beside
from atp_patch.patching.saving import adapter
from atp_patch.tools.arguments import named_values
from atp_patch.tools.parameter_groups import add_lora
from workshop.batches import Batch, BatchSpec, batches, make_batch
from workshop.dynamic.batches import SizedSpec, sized_batch
from workshop.labels import IGNORE
from workshop.losses import answered
from workshop.score import TaskScore, table

# What is trained besides VoCo tokens, and the folder next to the adapter that it is written to.
BESIDE: dict[str, Beside | None] = {"tokens": None, "lora": "lora", "decoder": "model"}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="builtin", choices=NAMES)
    add("--method", default="voco", choices=["voco", "prumerge", "prumerge+", "downsample"])
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="of the method")
    add("--keep", type=float, help="share of the visual tokens (not voco)")
    add("--learn", default="lora", choices=BESIDE, help="beside VoCo tokens, which always learn")
    add("--lora-rank", type=int, help="16 if not given")
    add("--lr", type=float, help="of LoRA or the decoder, 1e-3 if not given")
    add("--tokens-lr", type=float, help="of VoCo tokens, 1e-2 if not given")
    add("--steps", type=int, default=3000)
    add("--images", type=int, default=8, help="in a step, each with 12 questions")
    add("--out", type=Path, default=Path("compressed"))
    add("--resume", action="store_true")
    add("--save-every", type=int, default=200)
    add("--questions", type=int, default=200, help="a task, asked at the end; 0: none")
    add("--device", default="cpu")
    add("--seed", type=int, default=0, help="of what starts at random, and of the scenes")
    asked = parser.parse_args(arguments)
    _settle(parser, asked, "lora_rank", 16, asked.learn == "lora", "--learn lora")
    _settle(parser, asked, "lr", 1e-3, asked.learn != "tokens", "--learn lora or decoder")
    _settle(parser, asked, "tokens_lr", 1e-2, asked.method == "voco", "--method voco")
    return asked


def _settle(
    parser: argparse.ArgumentParser,
    asked: argparse.Namespace,
    name: str,
    default: float,
    applies: bool,
    where: str,
) -> None:
    """Give an option its default, or refuse it if it would have no effect."""
    if getattr(asked, name) is None:
        setattr(asked, name, default)
    elif not applies:
        parser.error(f"--{name.replace('_', '-')} goes with {where}.")


def build(asked: argparse.Namespace) -> tuple[Any, Any]:
    """Make the patched model, in which what is trained requires gradients, and its processor."""
    torch.manual_seed(asked.seed)
    model, processor = load_builtin(NAMES[asked.model], device=asked.device)
    options = named_values(asked.option)
    atp_patch.patch_model(model, method=asked.method, keep=asked.keep, **options)
    model.requires_grad_(False)
    if asked.learn == "lora":
        add_lora(model, asked.lora_rank, 2.0 * asked.lora_rank, leave_out=silent_layers(model))
    elif asked.learn == "decoder":
        model.get_decoder().requires_grad_(True)
        model.lm_head.requires_grad_(True)
    if asked.method == "voco":
        model.atp_patch_heads.requires_grad_(True)
    return model.train(), processor


def scenes(asked: argparse.Namespace, **fields: Any) -> tuple[BatchSpec, Callable[..., Batch]]:
    """Return the contents of batches and the function that makes them.

    All pictures of a batch have one size, also those of the second model.
    """
    if NAMES[asked.model] == DYNAMIC:
        return SizedSpec(asked.images, **fields), sized_batch
    return BatchSpec(asked.images, **fields), make_batch


def logits_of(model: Any, processor: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Compute the logits and the targets of a batch, reading each image once.

    Returns:
        (images * questions, tokens, vocabulary) logits, and (images * questions, tokens) targets.
    """
    ids, targets = (
        torch.tensor(batch[name]).flatten(0, 1).to(model.device) for name in ("ids", "targets")
    )
    pictures = list(batch.get("shown", batch["pixels"]))
    begun = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ""}]}]
    text = [processor.apply_chat_template(begun)] * len(pictures)
    read = processor(images=pictures, text=text, return_tensors="pt").to(model.device)
    cache = model(**read, use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(ids) // len(pictures))
    # Padding comes last, so no other token sees it.
    out = model(input_ids=ids, past_key_values=cache, use_cache=True)
    return out.logits, targets


def loss_of(model: Any, processor: Any, batch: Batch) -> Tensor:
    """Return the mean next-token loss of the answers."""
    logits, targets = logits_of(model, processor, batch)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE
    )


@torch.no_grad()
def score(model: Any, processor: Any, asked: argparse.Namespace) -> list[TaskScore]:
    """Count the exact answers by task on development scenes, as `workshop.score` does."""
    model.eval()
    silent = silent_layers(model)
    spec, draw = scenes(asked, tasks=TASKS, split="development")
    right, total = dict.fromkeys(TASKS, 0), dict.fromkeys(TASKS, 0)
    number = 0
    while min(total.values()) < asked.questions:
        batch = draw(spec, number)
        number += 1
        with without(model, silent):
            hits = answered(*logits_of(model, processor, batch))
        for k, name in enumerate(TASKS):
            found = hits[torch.tensor(batch["task"]).flatten() == k]
            found = found[: asked.questions - total[name]]
            right[name] += int(found.sum())
            total[name] += len(found)
    return [TaskScore(name, right[name], total[name]) for name in TASKS]


def train(asked: argparse.Namespace) -> None:
    """Train, write checkpoints at regular intervals, and write the adapter at the end."""
    model, processor = build(asked)
    silent = () if asked.learn == "decoder" else silent_layers(model)
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not learned:
        raise SystemExit(f"--method {asked.method} learns nothing itself; give --learn lora.")
    tokens = [p for name, p in learned.items() if name.startswith("atp_patch_heads.")]
    rest = [p for name, p in learned.items() if not name.startswith("atp_patch_heads.")]
    groups = [{"params": rest, "lr": asked.lr}, {"params": tokens, "lr": asked.tokens_lr}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
    warm = max(asked.steps // 30, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda k: min((k + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * k / asked.steps)),
    )
    asked.out.mkdir(parents=True, exist_ok=True)
    file, first = asked.out / "checkpoint.pt", 0
    if asked.resume:
        state = torch.load(file, map_location=asked.device, weights_only=True)
        model.load_state_dict(state["learned"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]
    elif file.exists():
        raise SystemExit(f"{file} is there already: --resume goes on with it.")
    start, losses = time.time(), []
    # Different seeds use different scenes.
    spec, draw = scenes(asked, offset=asked.seed * asked.steps * asked.images)
    for step, batch in enumerate(batches(spec, first, asked.steps, draw), first + 1):
        with without(model, silent):
            loss = loss_of(model, processor, batch)
            optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(learned.values(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % 10 == 0 or step == asked.steps:
            recent = sum(losses[-10:]) / len(losses[-10:])
            pace = (time.time() - start) / (step - first)
            sys.stdout.write(f"step {step}  loss {recent:.3f}  {pace:.2f} s a step\n")
            sys.stdout.flush()
        if step % asked.save_every == 0 or step == asked.steps:
            state = {
                "step": step,
                "learned": {name: p.detach() for name, p in learned.items()},
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            }
            torch.save(state, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)  # an interrupted write keeps the old one
    if asked.questions:
        sys.stdout.write(table(score(model, processor, asked)) + "\n")
    beside = BESIDE[asked.learn]
    saved = adapter(model, beside=beside)
    saved.place = str(asked.out / "adapter" if beside is None else asked.out)
    saved.save_pretrained(asked.out / "adapter")
    atp_patch.unpatch_model(model)
    if beside is not None:
        model.save_pretrained(asked.out / beside)
    if beside == "model":  # python -m atp_patch.evaluate --model ... --adapters ...
        processor.save_pretrained(asked.out / beside)


if __name__ == "__main__":
    train(parse())
