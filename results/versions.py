#!/usr/bin/env python3
"""Compare two checkouts of atp_patch in one run: prefill, what pruning itself costs, peak memory.

The earlier one is called base, the later one main. Both live in worker processes of their own with
the same random weights and inputs. Only one of them works at a time; they take turns pass by pass
(base first in even rounds, main first in odd ones), so that whatever drifts on the machine meets
both alike.

    git worktree add ../earlier COMMIT
    python results/versions.py ../earlier . --out versions.json          # everything
    python results/versions.py ../earlier . --tiny                       # does it work? (a minute)
    ... --cases batch1 batch8 long --rounds 11 5 3

A pass is one clocked prefill; each pruned one is followed by a second for the version's own clock.
The defaults make 9 passes a round and version for batch1, and 5 for batch8 and for long:
about half an hour on two idle cores. Methods at
random weights: what they keep differs from a trained model's, how many does not.

What is measured of each pass up to the next token's logits, with a cache:

prefill_ms      the whole pass.
overhead_ms     scoring, choosing and gathering, as each version's own bench times it (timed_seam),
                in passes of their own.
outside_ms      the pass less the time inside the host's own modules (tower, projector, embedding,
                rotary, decoder layers, norm, head). It asks nothing of either version's insides.
                Take "plain" off it: the rest is what pruning costs outside attention.
peak_mib        most memory resident during the pass above what was resident before it.

Printed: medians with quartiles, the ratio main / base of the medians, and the quartiles of the
ratio round by round (both passes of a round are neighbours in time). Logits and the tokens kept are
compared between the versions too.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LAYERS, KEEP = [1, 2, 3], [0.7, 0.6, 0.5]
METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "atp": {"method": "atp", "layers": LAYERS, "keep": KEEP},
    "fastv": {"method": "fastv", "layers": LAYERS, "keep": KEEP},
    "sparsevlm": {"method": "sparsevlm", "layers": LAYERS, "keep": KEEP},
    "random": {"method": "random", "layers": LAYERS, "keep": KEEP, "seed": 0},
}
CHOSEN = {
    "batch1": list(METHODS),
    "batch8": ["plain", "atp", "fastv"],
    "long": ["plain", "fastv", "random"],
}
# A case: preset, share of its layers, samples, images in one sample, text tokens of an image,
# rounds.
CASES: dict[str, dict[str, Any]] = {
    "batch1": {"preset": "llava-1.5-7b", "scale": 0.125, "batch": 1, "rounds": 11},
    "batch8": {"preset": "llava-1.5-7b", "scale": 0.125, "batch": 8, "rounds": 5},
    "long": {"preset": "tiny", "scale": 0.5, "batch": 1, "images": 34, "text": 12, "rounds": 3},
}
METRICS = ("prefill_ms", "overhead_ms", "outside_ms", "peak_mib")


# -- a worker: one version -------------------------------------------------------------------------


class Worker:
    """Holds one model of one version and runs passes on demand."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.model: Any = None

    def load(self, case: dict[str, Any]) -> dict[str, Any]:
        """Build the model and the inputs of a case."""
        import atp_patch
        from atp_patch.bench.presets import PRESETS

        torch = self.torch
        self.model = self.inputs = None
        gc.collect()
        preset = PRESETS[case["preset"]]
        torch.manual_seed(0)
        self.model = preset.build(case["scale"], "sdpa", "cpu", torch.bfloat16)
        images, text = case.get("images", 1), case.get("text", 64)
        found = preset.inputs(preset.image, case["batch"] * images, text, 0)
        for name in ("input_ids", "attention_mask"):  # the images of a sample follow each other
            found[name] = found[name].reshape(case["batch"], -1)
        found["pixel_values"] = found["pixel_values"].to(torch.bfloat16)
        self.inputs = found
        self.spent_ms = 0.0
        self._watch()
        return {
            "file": atp_patch.__file__,
            "tokens": found["input_ids"].shape[1],
            "layers": self.model.config.get_text_config().num_hidden_layers,
        }

    def _watch(self) -> None:
        """Sum up the time inside the host's modules; hooks run outside of a module's forward."""
        base = self.model.model
        decoder = base.language_model
        modules = [base.vision_tower, base.multi_modal_projector, self.model.lm_head]
        modules += [decoder.embed_tokens, decoder.rotary_emb, decoder.norm, *decoder.layers]
        for module in modules:
            module.forward = self._timed(module.forward)

    def _timed(self, forward: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return forward(*args, **kwargs)
            finally:
                self.spent_ms += 1000 * (time.perf_counter() - start)

        timed.__signature__ = inspect.signature(forward)
        return timed

    @contextmanager
    def patched(self, settings: dict[str, Any] | None) -> Any:
        """The model patched for a while; as it is where there are no settings."""
        import atp_patch

        if settings is None:
            yield
            return
        atp_patch.patch_model(self.model, **settings)
        try:
            yield
        finally:
            atp_patch.unpatch_model(self.model)

    def run(self, settings: dict[str, Any] | None, overhead: bool) -> dict[str, Any]:
        """One measured pass, and one more for the version's own clock if ``overhead``."""
        import atp_patch
        from atp_patch.bench.clock import peak_bytes, reset_peak
        from atp_patch.bench.measure import timed_seam

        cpu, found = self.torch.device("cpu"), {}
        with self.patched(settings), self.torch.inference_mode():
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # or what earlier passes left would hide this one's
            reset_peak(cpu)
            resident = peak_bytes(cpu)
            self.spent_ms = 0.0
            start = time.perf_counter()
            logits = self._pass()
            found["prefill_ms"] = 1000 * (time.perf_counter() - start)
            found["outside_ms"] = found["prefill_ms"] - self.spent_ms
            found["peak_mib"] = (peak_bytes(cpu) - resident) / 2**20
            found["logits"] = logits.float()[:, :64].flatten().tolist()
            if settings is not None:
                trace = atp_patch.last_trace(self.model)
                kept = [layer.kept for layer in trace.layers.values()]
                found["kept"] = [int(self._digest(k)) for k in kept]
                found["counts"] = [list(map(int, k.sum(1))) for k in kept]
                del trace, kept
                if overhead:
                    with timed_seam(self.model) as spent:
                        self._pass()
                        found["overhead_ms"] = spent()
        return found

    def _digest(self, kept: Any) -> Any:
        places = self.torch.arange(1, kept.shape[1] + 1)
        return (kept * places * places % 1_000_003).sum()

    def _pass(self) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config.get_text_config())
        out = self.model(**self.inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]


def work(threads: int) -> None:
    """Answer requests, one JSON object a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    import torch

    torch.set_num_threads(threads)
    worker = Worker()
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(getattr(worker, name)(*arguments)), file=answers, flush=True)


# -- the parent ------------------------------------------------------------------------------------


class Version:
    """A worker process with one version on its path."""

    def __init__(self, root: Path, threads: int) -> None:
        self.root = root
        env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads)}
        env.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", PYTHONDONTWRITEBYTECODE="1")
        command = [sys.executable, __file__, "--worker", "--threads", str(threads)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=env, text=True, cwd=root, **pipes)

    def ask(self, name: str, *arguments: Any) -> Any:
        """What a method of the :class:`Worker` over there returns."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, arguments]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker of {self.process.args} ended; its error is above.")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))  # type: ignore[return-value]


def measure(case: dict[str, Any], versions: dict[str, Version]) -> dict[str, Any]:
    """All rounds of one case: method -> version -> metric -> values, and what differs."""
    for version in versions.values():
        about = version.ask("load", case)
        assert about["file"].startswith(str(version.root)), about
    print(f"  {about['layers']} decoder layers, {about['tokens']} tokens a sample", flush=True)
    found: dict[str, Any] = {
        m: {v: {k: [] for k in METRICS} for v in versions} for m in case["methods"]
    }
    differs: dict[str, Any] = {m: {"logits": 0.0, "kept": False} for m in case["methods"]}
    for run in range(case["rounds"] + 1):  # the first is warm-up
        turn = run % len(case["methods"])
        for method in [*case["methods"][turn:], *case["methods"][:turn]]:
            passed = {}
            for name in list(versions)[:: -1 if run % 2 else 1]:
                passed[name] = versions[name].ask("run", METHODS[method], True)
            one, two = passed.values()
            far = max(abs(a - b) for a, b in zip(one["logits"], two["logits"], strict=True))
            differs[method]["logits"] = max(differs[method]["logits"], far)
            differs[method]["kept"] |= one.get("kept") != two.get("kept")
            differs[method]["counts"] = {name: p.get("counts") for name, p in passed.items()}
            for name, values in passed.items() if run else ():
                for metric in METRICS:
                    if metric in values:
                        found[method][name][metric].append(values[metric])
    return {"values": found, "differs": differs, **about}


def report(case: str, result: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    lines = [
        f"\n## {case}: {result['layers']} decoder layers, {result['tokens']} tokens a sample\n"
    ]
    lines += ["| method | metric | base | main | main / base | ratio by round |", "|" + "---|" * 6]
    for method, versions in result["values"].items():
        for metric in METRICS:
            base, main = (versions[name][metric] for name in ("base", "main"))
            if not base:
                continue
            cells = [
                f"{m:.1f} ({low:.1f} to {high:.1f})"
                for low, m, high in map(quartiles, (base, main))
            ]
            middle = quartiles(base)[1]
            ratio = f"{quartiles(main)[1] / middle:.3f}" if middle > 0 else "-"
            paired = [b / a for a, b in zip(base, main, strict=True) if a > 0]
            low, m, high = quartiles(paired) if paired else (0.0, 0.0, 0.0)
            spread = f"{m:.3f} ({low:.3f} to {high:.3f})" if paired else "-"
            lines.append(f"| {method} | {metric} | {' | '.join(cells)} | {ratio} | {spread} |")
    for name in ("base", "main"):
        plain = quartiles(result["values"]["plain"][name]["outside_ms"])[1]
        whole = quartiles(result["values"]["plain"][name]["prefill_ms"])[1]
        shares = []
        for method, versions in result["values"].items():
            if method == "plain":
                continue
            more = quartiles(versions[name]["outside_ms"])[1] - plain
            own = quartiles(versions[name]["overhead_ms"])[1]
            prefill = quartiles(versions[name]["prefill_ms"])[1]
            shares.append(
                f"{method} {own / whole:.2%} by its own clock, {more / whole:.2%} outside the "
                f"modules, prefill {prefill / whole:.3f} of plain"
            )
        lines.append(f"\n{name}, overhead as a share of the plain prefill: {'; '.join(shares)}.")
    for method, what in result["differs"].items():
        kept = "OTHER tokens kept" if what["kept"] else "the same tokens kept"
        counts = what["counts"]
        same = "" if counts["base"] == counts["main"] else f", counts differ: {counts}"
        lines.append(f"\n{method}: {kept}{same}; logits differ by {what['logits']:.3g} at most.")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", type=Path, nargs="?", help="a checkout of the earlier version")
    parser.add_argument("main", type=Path, nargs="?", help="a checkout of the later version")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", nargs="+", type=int, help="of each case, in their order")
    parser.add_argument("--methods", nargs="+", choices=[m for m in METHODS if m != "plain"])
    parser.add_argument("--tiny", action="store_true", help="two rounds of the smallest shape")
    parser.add_argument("--out", type=Path, default=Path("versions.json"))
    options = parser.parse_args()
    if options.worker:
        work(options.threads)
        return
    if options.base is None or options.main is None:
        parser.error("give the folders of two checkouts.")
    checkouts = {"base": options.base.resolve(), "main": options.main.resolve()}
    cases = {name: dict(CASES[name]) for name in options.cases}
    for number, (name, case) in enumerate(cases.items()):
        if options.tiny:
            case.update(preset="tiny", scale=0.5, rounds=2)
            if "images" in case:
                case["images"] = 3
        if options.rounds:
            case["rounds"] = options.rounds[min(number, len(options.rounds) - 1)]
        case["methods"] = CHOSEN[name]
        if options.methods:
            case["methods"] = ["plain", *options.methods]
    results: dict[str, Any] = {}
    start = time.perf_counter()
    heads = {
        name: subprocess.run(
            ["git", "-C", str(root), "log", "-1", "--format=%h %s"], capture_output=True, text=True
        ).stdout.strip()
        for name, root in checkouts.items()
    }
    # A copy of its last commit: nothing that lands meanwhile is mixed in.
    copied = tempfile.TemporaryDirectory(prefix="before_after_")
    archive = ["git", "-C", str(checkouts["main"]), "archive", "HEAD", "atp_patch"]
    files = subprocess.run(archive, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", copied.name], input=files, check=True)
    roots = {**checkouts, "main": Path(copied.name)}
    lines = [f"main at {heads['main']}; {options.threads} threads."]
    # One pair of workers a case: what one case leaves in the allocator does not meet the next.
    for name, case in cases.items():
        print(f"{name} ...", flush=True)
        versions = {key: Version(root, options.threads) for key, root in roots.items()}
        try:
            results[name] = measure(case, versions)
        finally:
            for version in versions.values():
                version.close()
        lines += report(name, results[name])
        print(f"  {time.perf_counter() - start:.0f} s so far", flush=True)
        options.out.write_text(json.dumps({"heads": heads, "cases": cases, "results": results}))
        options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"\nAll values: {options.out}; this table: {options.out.with_suffix('.md')}")


if __name__ == "__main__":
    main()
