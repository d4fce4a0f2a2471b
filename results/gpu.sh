#!/usr/bin/env bash
# What a GPU is asked, in about ten minutes on one with 24 GB or more:
#
#     OUT=gpu results/gpu.sh
#
# Every step writes JSON to OUT as soon as it has figures, so that an interrupted run leaves what it
# found. PRESET=tiny SIZES_PRESET=tiny DEVICE=cpu tries every step without a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-results/gpu}
PYTHON=${PYTHON:-python}
DEVICE=${DEVICE:-cuda}
PRESET=${PRESET:-llava-1.5-7b}
SIZES_PRESET=${SIZES_PRESET:-qwen2-vl-7b}
ROUNDS=${ROUNDS:-15}
mkdir -p "$OUT"

bench() {
    name=$1
    shift
    echo "== $name"
    $PYTHON -m atp_patch.bench --device "$DEVICE" --dtype bfloat16 --runs "$ROUNDS" --quiet \
        --json "$OUT/$name.json" "$@" > "$OUT/$name.md" || echo "$name failed: $?"
}

# Table 6 of ATP-LLaVA: 126, 88 and 20 tokens behind layers 4, 14 and 24.
layers=()
[ "$PRESET" = tiny ] || layers=(--layers 4,14,24)
for attention in sdpa flash_attention_2; do
    [ "$attention" = sdpa ] || $PYTHON -c "import flash_attn" 2> "$OUT/$attention.txt" || continue
    bench "table6-$attention" --preset "$PRESET" --attn "$attention" --methods atp,fastv@2,random \
        "${layers[@]}" --schedule 126,88,20
done
bench batches --preset "$PRESET" --methods atp,fastv@2,divprune --batch-size 1,8,32 --keep 0.5

# Pictures of about 100 to 16,000 visual tokens.
sizes=336x336
[ "$SIZES_PRESET" = tiny ] || sizes=280x280,560x560,1120x1120,2240x2240,3584x3584
bench sizes --preset "$SIZES_PRESET" --methods atp,fastv@1,random,divprune --keep 0.25 \
    --image $sizes --decode-tokens 4

# Which kernels score and gather, and how often a prefill waits for the GPU.
for method in atp fastv random divprune; do
    echo "== profile of $method"
    $PYTHON results/prefill_profile.py "$PRESET" --method $method --device "$DEVICE" \
        --json "$OUT/profile-$method.json" || echo "profile of $method failed: $?"
done
