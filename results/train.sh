#!/bin/sh
# Trains what docs/results.md says of training, and measures it: three seeds a recipe, one of methods
# before the decoder.
#   results/train.sh [compressed|main|tables|measure]...      (default: all of them)
# PYTHON is the interpreter, WORK the folder of the trainings, OUT that of the results. A killed run
# goes on where it was.
set -eu
PYTHON=${PYTHON:-python}
HERE=$(dirname "$0")
OUT=${OUT:-$HERE}
WORK=${WORK:-$HERE/trainings}
SEEDS=${SEEDS:-0 1 2}
EARLY=1,4,10 # chosen on development questions (docs/results.md)

# train RECIPE FLAGS...
train() {
    recipe=$1
    shift
    for seed in $SEEDS; do
        folder=$WORK/$recipe/$seed
        [ ! -d "$folder/adapter" ] || continue
        resume=
        [ ! -d "$folder" ] || [ -z "$(find "$folder" -name 'checkpoint-*')" ] || resume=--resume
        $PYTHON -m atp_patch.train "$HERE/../examples/builtin_frozen.yaml" \
            --layers $EARLY --seed "$seed" --out "$folder" "$@" $resume
    done
}
quarter() { train "$@" --target-tokens 144; }
sixth() { train "$@" --target-tokens 86.4; } # 15 %

# compress NAME FLAGS...
compress() {
    folder=$WORK/$1
    shift
    [ ! -d "$folder/adapter" ] || return 0
    resume=
    [ ! -f "$folder/checkpoint.pt" ] || resume=--resume
    $PYTHON "$HERE/../examples/train_compressed.py" --save-every 50 --out "$folder" \
        "$@" $resume
}
compressed() {
    for tokens in 1 2 8 32; do
        compress voco$tokens --method voco --option num_tokens=$tokens --steps 1000
    done
    compress prumerge+lora --method prumerge+ --steps 500
}
main() {
    quarter frozen25
    sixth frozen15
    quarter lora25 --lora-rank 16 --lr 1e-3 --steps 400
    sixth lora15 --lora-rank 16 --lr 1e-3 --steps 400
    quarter late25 --layers 4,14,24
}
# The paper's tables 2 to 5, and what its equations leave open, at the smaller budget.
tables() {
    sixth redundant15 --option spatial_share=0
    sixth spatial15 --option spatial_share=1
    sixth self15 --option score=self
    sixth mean15 --option score=mean
    sixth scores15 --option threshold_inputs=scores
    sixth literal15 --option surrogate=literal --option slope=1e6
    sixth target15 --option target_loss=paper
    sixth turned15 --lora-rank 16 --lr 1e-3 --steps 400 --rope-2d
    quarter paper25 --layers 4,14,24 --option surrogate=literal --option slope=1e6 \
        --option score=mean --option score_norm=none --option cross_over=all \
        --option threshold_inputs=scores --option standardise=false --option target_loss=paper
}
measure() {
    mkdir -p "$OUT/training/runs"
    cp -n "$OUT"/builtin/runs/* "$OUT/training/runs/" 2>/dev/null || true # the same questions
    adapters=
    for recipe in frozen25 frozen15 lora25 lora15; do
        for control in "" ~mean ~shuffled; do adapters=$adapters$WORK/$recipe$control,; done
    done
    for recipe in late25 redundant15 spatial15 self15 mean15 scores15 literal15 target15 turned15 \
        paper25; do adapters=$adapters$WORK/$recipe,; done
    layers=$(echo $EARLY | tr , +)
    methods=
    for name in atp fixed fastv random uniform; do methods=$methods$name@$layers:0.25+0.15,; done
    $PYTHON -m atp_patch.evaluate --methods "${methods%,}" --adapters "${adapters%,}" \
        --questions 500 --seeds 3 --out "$OUT/training"
}

[ $# -gt 0 ] || set -- compressed main tables measure
for part in "$@"; do "$part"; done
