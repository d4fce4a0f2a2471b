"""The bench: what it reports is what the cache and the trace say, and its presets are models."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import atp_patch
from atp_patch.bench.__main__ import main
from atp_patch.bench.clock import Times, between_ms, mark, peak_bytes, reset_peak
from atp_patch.bench.comparison_tables import entries, table
from atp_patch.bench.measure import PLAIN, Contender, compare, patched, timed_seam
from atp_patch.bench.presets import PRESETS, Preset
from atp_patch.contract.errors import ConfigError
from atp_patch.patching.api import require_patch

CPU = torch.device("cpu")
# Real families in sizes that a test can build: depth and width cut, heads as wide as they are.
NARROW = {
    "hidden_size": 256,
    "mlp_size": 128,
    "num_layers": 4,
    "tower_layers": 2,
    "vocab_size": 200,
}
SMALL: dict[str, tuple[Preset, tuple[int, int], int]] = {
    "llava": (replace(PRESETS["tiny"], **NARROW), (336, 336), 576),
    "qwen": (
        replace(PRESETS["qwen2-vl-7b"], **NARROW, num_heads=2, num_kv_heads=1),
        (168, 112),
        6 * 4,
    ),
    "internvl": (
        replace(
            PRESETS["internvl-8b"],
            **NARROW,
            num_heads=2,
            num_kv_heads=1,
            tower_sizes=(32, 32, 1),
        ),
        (896, 448),
        3 * 256,
    ),
}
if hasattr(transformers, "Gemma4Config"):  # not in early versions
    SMALL["gemma4"] = (
        replace(
            PRESETS["gemma4-e2b"],
            **NARROW,
            num_heads=2,
            head_dim=16,
            full_head_dim=32,
            per_layer_size=8,
            tower_sizes=(32, 32, 2),
            reusing_layers=1,
            period=3,
        ),
        (288, 192),
        6 * 4,
    )


def run(tmp_path: Path, *options: str) -> dict[str, object]:
    path = tmp_path / "report.json"
    status = main(["--preset", "tiny", "--runs", "2", "--json", str(path), *options])
    assert status == 0
    report: dict[str, object] = json.loads(path.read_text())
    return report


def test_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "tiny", SMALL["llava"][0])
    plot = tmp_path / "plot.png"
    options = ["--methods", "atp,fastv@1,prumerge+,voco", "--target-tokens", "250"]
    options += ["--decode-tokens", "2", "--batch-size", "1,2", "--prompt-tokens", "20"]
    report = run(tmp_path, *options, "--plot", str(plot))
    assert plot.stat().st_size > 0
    cases = report["cases"]
    assert [case["batch_size"] for case in cases] == [1, 2]
    shown = capsys.readouterr().out
    for case in cases:
        columns, batch = case["contenders"], case["batch_size"]
        assert list(columns) == [PLAIN, "atp", "fastv@1", "prumerge+", "voco"]
        plain = columns[PLAIN]
        a_token = 2 * 4 * 64 * 4  # keys and values, heads, head size, bytes, in each of 4 layers
        # The plain cache holds the prompt and the two tokens that were decoded.
        assert plain["kv_bytes"] == batch * 4 * (576 + 20 + 2) * a_token
        for name, column in columns.items():
            for key in ("vision_ms", "decoder_ms", "prefill_ms", "decode_ms"):
                assert column[key]["q1"] <= column[key]["median"] <= column[key]["q3"]
            spent = column["tokens_per_second"] * column["decode_ms"]["median"]
            assert spent == pytest.approx(1000 * batch)
            if name != PLAIN:
                against = column["against_plain"]
                assert against["flops_ratio"] == pytest.approx(plain["flops"] / column["flops"])
                wanted = against["decoder_speedup"] / against["flops_ratio"]
                assert against["efficiency"] == pytest.approx(wanted)
            if name in ("atp", "fastv@1", "prumerge+"):
                held = sum(n + 20 + 2 for n in column["tokens_per_layer"])
                assert column["kv_bytes"] == batch * held * a_token
                assert column["average_tokens"] == pytest.approx(250, abs=2)
                assert column["overhead_ms"]["median"] > 0
        assert "| score, choose, merge, gather ms |" in shown


def test_samples_that_keep_different_counts_all_count() -> None:
    """Each picture decides by itself; what is reported is no single one's."""
    preset, image, _ = SMALL["llava"]
    torch.manual_seed(0)
    model = preset.build(1.0, "sdpa", "cpu", torch.float32)
    inputs = preset.inputs(image, 4, 12, seed=0)
    contenders = [Contender(PLAIN, prunes=False)]
    contenders.append(patched(model, "prumerge", {"method": "prumerge"}))
    found = compare(model, contenders, inputs, runs=1, decode_tokens=0)
    trace = found["prumerge"].trace
    assert trace is not None
    counts = trace.tokens_per_layer[:, 0].tolist()
    assert len(set(counts)) > 1
    columns = entries(found, 4)
    assert columns["prumerge"]["average_tokens"] == pytest.approx(sum(counts) / 4)
    assert columns[PLAIN]["average_tokens"] == 576
    wide, mlp = NARROW["hidden_size"], NARROW["mlp_size"]
    for name, visual in ((PLAIN, [576] * 4), ("prumerge", counts)):
        lengths = [count + 12 for count in visual]
        layer = sum(4 * n * wide**2 + 2 * n**2 * wide + 2 * n * wide * mlp for n in lengths)
        assert columns[name]["paper_flops"] == pytest.approx(NARROW["num_layers"] * layer)


def test_merging_counts_as_overhead() -> None:
    preset, image, _ = SMALL["llava"]
    torch.manual_seed(0)
    model = preset.build(1.0, "sdpa", "cpu", torch.float32)
    inputs = preset.inputs(image, 1, 12, seed=0)
    calls = []
    with patched(model, "prumerge+", {"method": "prumerge+"}).applied():
        hooks = require_patch(model).seam.vision
        merge = hooks.merge
        hooks.merge = lambda groups: (time.sleep(0.25), calls.append(1), merge(groups))[-1]
        with torch.inference_mode(), timed_seam(model) as spent:
            model(**inputs)
        assert calls == [1]
        assert 250 <= spent() < 5000


def test_a_pair_prunes_twice(tmp_path: Path) -> None:
    options = ["--methods", "prumerge+/atp@2+4", "--keep", "0.5", "--decode-tokens", "0"]
    report = run(tmp_path, *options)
    column = report["cases"][0]["contenders"]["prumerge+/atp@2+4"]
    first, *_, last = tokens = column["tokens_per_layer"]
    assert 576 > first == tokens[1] > tokens[2] == tokens[3] > tokens[4] == last
    assert report["settings"]["methods"] == "prumerge+/atp@2+4"
    assert report["settings"]["seed"] == 0
    assert len(report["date"]) == 10


def test_schedule_is_met_to_the_token(tmp_path: Path) -> None:
    options = ["--methods", "atp,random", "--layers", "1,3,6", "--schedule", "126,88,20"]
    report = run(tmp_path, *options, "--decode-tokens", "0")
    columns = report["cases"][0]["contenders"]
    for name in ("atp", "random"):
        assert columns[name]["tokens_per_layer"] == [576, 126, 126, 88, 88, 88, 20, 20]
    own = run(tmp_path, "--methods", "atp,fastv@1", *options[2:], "--decode-tokens", "0")
    columns |= own["cases"][0]["contenders"]
    assert columns["fastv@1"]["tokens_per_layer"][:2] != [576, 126]
    assert columns["fastv@1"]["average_tokens"] == pytest.approx(
        columns["atp"]["average_tokens"], abs=0.5
    )
    assert columns["atp"]["decode_ms"] is None
    assert columns["atp"]["tokens_per_second"] is None


def test_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(tmp_path, "--profile", "--decode-tokens", "0", "--prompt-tokens", "10")
    column = report["cases"][0]["contenders"]["atp"]
    lengths = column["same_lengths"]["layer_lengths"]
    assert lengths == [n + 10 for n in column["tokens_per_layer"]]
    assert set(column["same_lengths"]["plain_ms"]) == {str(n) for n in lengths}
    assert "where the time of atp goes" in capsys.readouterr().out


@pytest.mark.parametrize("kind", list(SMALL))
def test_presets_are_models_that_can_be_pruned(kind: str) -> None:
    preset, image, tokens = SMALL[kind]
    assert preset.visual_tokens(image) == tokens
    torch.manual_seed(0)
    model = preset.build(1.0, "sdpa", "cpu", torch.float32)
    inputs = preset.inputs(image, 2, 12, seed=0)
    keys = set(model.state_dict())
    settings = {"layers": [1, 2], "method": "fixed", "keep": 0.5}
    found = compare(
        model,
        [Contender(PLAIN, prunes=False), patched(model, "fixed", settings)],
        inputs,
        runs=1,
        decode_tokens=1,
    )
    trace = found["fixed"].trace
    assert trace is not None
    assert trace.tokens_per_layer[1].tolist() == [tokens, tokens // 2, tokens // 4, tokens // 4]
    assert trace.text_tokens == (12, 12)
    assert found["fixed"].kv_bytes < found[PLAIN].kv_bytes
    assert 0 < found["fixed"].vision.median_ms < found["fixed"].prefill.median_ms
    assert set(model.state_dict()) == keys
    assert not any("atp" in name for name in vars(model))
    assert "get_image_features" not in vars(model.model)


STATES: dict[str, tuple[Preset, tuple[int, int], int]] = {
    "qwen3.5": (
        replace(PRESETS["qwen3.5-9b"], **{**NARROW, "num_layers": 8}, num_heads=2, num_kv_heads=1),
        (192, 128),
        6 * 4,
    ),
    "lfm2_vl": (
        replace(
            PRESETS["lfm2-vl-1.6b"],
            **{**NARROW, "num_layers": 8},
            num_heads=2,
            num_kv_heads=1,
            tile=128,
            tower_sizes=(32, 32, 1),
        ),
        (256, 128),
        3 * 16,
    ),
}


@pytest.mark.parametrize(("kind", "layers"), [("qwen3.5", [4]), ("lfm2_vl", [3, 6])])
def test_states_are_counted_beside_keys(kind: str, layers: list[int]) -> None:
    preset, image, tokens = STATES[kind]
    if not hasattr(transformers, {"qwen3.5": "Qwen3_5Config", "lfm2_vl": "Lfm2VlConfig"}[kind]):
        pytest.skip("this version has not got the model")
    assert preset.visual_tokens(image) == tokens
    assert preset.pruning_layers(8) == layers
    torch.manual_seed(0)
    model = preset.build(1.0, "sdpa", "cpu", torch.float32)
    contenders = [
        Contender(PLAIN, prunes=False),
        patched(model, "fixed", {"layers": layers, "method": "fixed", "keep": 0.5}),
    ]
    inputs = preset.inputs(image, 1, 12, seed=0)
    found = compare(model, contenders, inputs, runs=1, decode_tokens=1)
    plain, pruned = found[PLAIN], found["fixed"]
    assert pruned.trace is not None
    assert pruned.trace.tokens_per_layer[0, [layers[0] - 1, layers[0]]].tolist() == [
        tokens,
        tokens // 2,
    ]
    assert pruned.kv_bytes < plain.kv_bytes
    assert pruned.state_bytes == plain.state_bytes > 0
    case = {
        "batch_size": 1,
        "prompt_tokens": 12,
        "runs": 1,
        "image": list(image),
        "visual_tokens": tokens,
        "contenders": entries(found, 1),
    }
    (row,) = (line for line in table(case).splitlines() if line.startswith("| states MB"))
    sizes = [f"{plain.state_bytes / 1e6:.1f}"] * 2
    assert [cell.strip() for cell in row.split("|")[2:4]] == sizes


def test_full_presets_have_the_published_sizes() -> None:
    wanted = {
        "llava-1.5-7b": (32, 4096, 576),
        "llava-1.5-13b": (40, 5120, 576),
        "qwen2-vl-7b": (28, 3584, 32 * 24),
        "internvl-8b": (28, 3584, 5 * 256),
        "gemma4-e2b": (35, 1536, 20 * 14),
        "qwen3.5-9b": (32, 4096, 32 * 24),
        "lfm2-vl-1.6b": (16, 2048, 5 * 256),
    }
    for name, (layers, hidden, tokens) in wanted.items():
        config = {"gemma4": "Gemma4Config", "qwen3.": "Qwen3_5Config", "lfm2-v": "Lfm2VlConfig"}
        if not hasattr(transformers, config.get(name[:6], "LlavaConfig")):
            continue
        preset = PRESETS[name]
        text = preset.config(preset.depth(1.0)).get_text_config()
        assert (text.num_hidden_layers, text.hidden_size) == (layers, hidden)
        assert preset.visual_tokens(preset.image) == tokens
    assert PRESETS["llava-1.5-7b"].depth(0.25).decoder == 8


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--scale", "0"], ["--scale 0", "above 0"]),
        (["--image", "400x400"], ["400x400", "336x336"]),
        (["--preset", "qwen2-vl-7b", "--image", "100x100"], ["100x100", "28"]),
        (["--preset", "internvl-8b", "--image", "500x448"], ["500x448", "448"]),
        (["--schedule", "126,88"], ["2 counts", "--layers"]),
        (["--layers", "2,4", "--schedule", "88,126"], ["[88, 126]", "fall from 576"]),
        (["--methods", "fastv@2", "--schedule", "88,126"], ["2 counts", "--layers"]),
        (["--methods", "prumerge+", "--schedule", "88"], ["inside the decoder"]),
        (["--methods", "fastv@two"], ["fastv@two", "fastv@1+13+25"]),
        (["--image", "336"], ["invalid comma-separated size list value: '336'"]),
        (["--methods", "fastv@"], ["fastv@", "layers"]),
        (["--methods", "fastv:0.5"], ["fastv:0.5", "--keep"]),
        (["--methods", "downsample@2"], ["downsample@2", "before the decoder"]),
        (["--methods", "fastest"], ["'fastest'", "fastv"]),
        (["--runs", "0"], ["--runs", "at least 1"]),
        (["--batch-size", "1,0"], ["--batch-size", "at least 1"]),
        (["--decode-tokens", "-1"], ["--decode-tokens", "0 or more"]),
        (["--train", "--decode-tokens", "2"], ["--decode-tokens", "--train"]),
        (["--methods", "prumerge", "--layers", "2"], ["--layers", "leave it out"]),
        (["--methods", "voco", "--target-tokens", "200"], ["voco", "is its budget"]),
        (["--target-tokens", "20"], ["target_tokens=20", "least possible"]),
        (["--methods", "voco", "--profile"], ["--profile", "voco"]),
        (["--json", "nowhere/report.json"], ["--json nowhere/report.json", "folder"]),
        (["--plot", "."], ["--plot .", "folder"]),
        (["--methods", "atp@"], ["--methods atp@", "after @ come layers"]),
        (["--methods", "atp@2+"], ["--methods atp@2+", "after @ come layers"]),
        (["--methods", "atp,fastv@8"], ["layers=[8]", "1 to 7"]),
        (["--methods", "prumerge@2"], ["prumerge@2", "before the decoder"]),
        (["--methods", "magic"], ["'magic'", "fastv"]),
        (["--methods", ""], ["''", "fastv"]),
        (["--layers", "8"], ["layers=[8]", "1 to 7"]),
        (["--train", "--layers", "8"], ["layers=[8]", "1 to 7"]),
        (["--keep", "7"], ["keep", "at most 1"]),
        (["--device", "toaster"], ["--device toaster", "give cpu"]),
        (["--device", "meta"], ["--device meta", "give cpu"]),
        (["--seed", "-1"], ["--seed", "int"]),
        (["--image", "0x0"], ["--image", "'0x0'"]),
        (["--image=-28x28"], ["--image", "-28x28"]),
        (["--batch-size", "9" * 30], ["--batch-size", "below 2**31"]),
        (["--prompt-tokens", "9" * 30], ["--prompt-tokens", "below 2**31"]),
        (["--seed", "9" * 30], ["--seed", "int"]),
        (["--json", "a\0b"], ["an argument", "no text"]),
        (["--plot", "a\ud800b.png"], ["an argument", "no text"]),
        (["--json", "a" * 5_000], ["File name too long"]),
    ],
)
def test_bad_arguments(
    options: list[str],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build = Preset.build

    def without_weights(
        self: Preset, scale: float, attn: str, device: str, dtype: object
    ) -> object:
        assert device == "meta", "a model was built before the argument was refused"
        return build(self, scale, attn, device, dtype)

    monkeypatch.setattr(Preset, "build", without_weights)
    assert main(["--preset", "tiny", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in parts:
        assert part in error


def test_spread_and_marks() -> None:
    assert Times().spread() is None
    assert Times([4.0]).spread() == {"median": 4.0, "q1": 4.0, "q3": 4.0, "values": [4.0]}
    five = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert Times(five).spread() == {"median": 3.0, "q1": 2.0, "q3": 4.0, "values": five}
    start = mark(CPU)
    assert between_ms(start, mark(CPU)) >= 0
    with pytest.raises(ConfigError):
        PRESETS["tiny"].depth(1.5)


def test_peak_memory_sees_a_large_tensor() -> None:
    reset_peak(CPU)
    before = peak_bytes(CPU)
    if before is None:
        pytest.skip("this machine does not tell")
    large = torch.ones(64 * 2**20)
    del large
    after = peak_bytes(CPU)
    assert after is not None
    assert after - before > 200e6
    reset_peak(CPU)
    later = peak_bytes(CPU)
    assert later is not None
    assert later < after - 100e6


def test_the_patch_is_taken_off_after_an_error() -> None:
    model = PRESETS["tiny"].build(1.0, "sdpa", "cpu", torch.float32)
    contender = patched(model, "atp", {"layers": [2], "keep": 0.5})
    with pytest.raises(KeyError), contender.applied():
        raise KeyError
    with pytest.raises(atp_patch.ATPError):
        atp_patch.last_trace(model)
