#!/bin/sh
# Trains what docs/results.md says of training, and measures it: three seeds a recipe. Where nothing
# else is said it is the second built-in model, which trains in half the time.
#   results/train.sh [sixths|quarters|tables|longer|choices|turned|compressed]...      (default: all of them)
# PYTHON is the interpreter, WORK the folder of the trainings, OUT that of the results. A killed run
# goes on where it was.
set -eu
PYTHON=${PYTHON:-python}
HERE=$(dirname "$0")
OUT=${OUT:-$HERE}
WORK=${WORK:-$HERE/trainings}
SEEDS=${SEEDS:-0 1 2}
EARLY=1,4,10 # chosen on development questions (docs/results.md)
AT=1+4+10 # the same, behind the name of a method
SETTINGS=builtin_frozen # or builtin_paper: the equations as they are printed

# train RECIPE FLAGS...
train() {
    recipe=$1
    shift
    for seed in $SEEDS; do
        folder=$WORK/$recipe/$seed
        [ ! -d "$folder/adapter" ] || continue
        resume=
        [ ! -d "$folder" ] || [ -z "$(find "$folder" -name 'checkpoint-*')" ] || resume=--resume
        $PYTHON -m atp_patch.train "$HERE/../examples/$SETTINGS.yaml" \
            --seed "$seed" --out "$folder" "$@" $resume
    done
}
early() { train "$@" --layers $EARLY; } # of the first model's 576 tokens
# Of the second model's 183 tokens on average.
fifth() { train "$@" --model builtin-dynamic --layers 1,4,6 --target-tokens 37; }
LORA="--lora-rank 16 --lr 1e-3"

# compress RECIPE FLAGS...
compress() {
    recipe=$1
    shift
    for seed in $SEEDS; do
        folder=$WORK/$recipe/$seed
        [ ! -d "$folder/adapter" ] || continue
        resume=
        [ ! -f "$folder/checkpoint.pt" ] || resume=--resume
        PYTHONPATH=$HERE/..${PYTHONPATH:+:$PYTHONPATH} $PYTHON -m workshop.train_compressed --save-every 50 --seed "$seed" \
            --out "$folder" "$@" $resume
    done
}
# trained RECIPES...: their folders, with a comma between them
trained() {
    folders=
    for recipe in "$@"; do folders=$folders$WORK/$recipe,; done
    echo "${folders%,}"
}
# controlled RECIPES...: each with its controls
controlled() { for recipe in "$@"; do echo "$recipe $recipe~mean $recipe~shuffled"; done; }
# measure NAME BUDGET RECIPES...: beside their controls and what needs no training
measure() {
    name=$1 budget=$2
    shift 2
    methods=
    for method in atp fixed fastv random uniform; do methods=$methods$method@$AT,; done
    $PYTHON -m atp_patch.evaluate --methods "${methods%,}" --budgets "$budget" \
        --adapters "$(trained $(controlled "$@"))" --questions 500 --seeds 3 --out "$OUT/$name"
}
sixth() { early "$@" --target-tokens 86.4; } # 15 %
lora15() { sixth lora15 $LORA; }
sixths() {
    sixth frozen15
    lora15
    measure thresholds-15 0.15 frozen15 lora15
}
quarters() {
    early frozen25 --target-tokens 144
    early lora25 --target-tokens 144 $LORA
    measure thresholds-25 0.25 frozen25 lora25
}
best20() { fifth best20; }
mean20() { fifth mean20 --option score=mean; }
# The paper's tables 2 to 5.
tables() {
    best20
    fifth redundant20 --option spatial_share=0
    fifth spatial20 --option spatial_share=1
    fifth self20 --option score=self
    mean20
    fifth lora20 $LORA
    measure_fifth tables $(controlled best20) redundant20 spatial20 self20 mean20 lora20
}
# Whether a training three times as long tells instances apart.
longer() {
    fifth long20 --option reference_grid=6 --steps 900
    measure_fifth longer $(controlled long20)
}
measure_fifth() {
    name=$1
    shift
    $PYTHON -m atp_patch.evaluate --model builtin-dynamic --methods atp,fixed,fastv,random,uniform \
        --budgets 0.2 --adapters "$(trained "$@")" --questions 500 --seeds 3 --out "$OUT/$name"
}
# What the equations leave open, each against `best20`: on development questions, for a choice.
choices() {
    best20
    mean20
    fifth all20 --option cross_over=all
    fifth raw20 --option score_norm=none
    fifth minmax20 --option score_norm=minmax
    fifth strided20 --option spatial_order=strided
    fifth scores20 --option threshold_inputs=scores
    fifth literal20 --option surrogate=literal --option slope=1e6
    fifth annealed20 --option slope=10 --option slope_end=100 --option anneal_passes=300
    fifth smooth20 --option target_loss=smooth
    fifth distance20 --option target_loss=paper
    fifth shares20 --option lambda_atp=0.05
    (SETTINGS=builtin_paper && fifth paper20)
    adapters=$(trained best20 mean20 all20 raw20 minmax20 strided20 scores20 literal20 annealed20 \
        smooth20 distance20 shares20 paper20)
    $PYTHON -m atp_patch.evaluate --model builtin-dynamic --methods atp,random,uniform \
        --budgets 0.2 --adapters "$adapters" --split development --questions 200 --seeds 3 \
        --out "$OUT/choices"
}
# Positions in rows and columns: the first model has none yet.
turned() {
    lora15
    sixth turned15 $LORA --rope-2d
    $PYTHON -m atp_patch.evaluate --methods random,uniform --layers $EARLY --budgets 0.15 \
        --adapters "$(trained lora15 turned15)" --questions 500 --seeds 3 --out "$OUT/turned"
}
# Methods before the decoder that learned, of both models, beside tokens at random and on a grid, and
# pictures shrunk to about as many tokens: to 132, 36, 9 and 1, and to 31, 22, 8, 2 and 1.
compressed() {
    before builtin compressed "random@$AT:0.06,uniform@$AT:0.06" 0.222+0.0626+0.0157+0.0018
    before builtin-dynamic compressed-dynamic random:0.175,uniform:0.175 \
        0.175+0.122+0.044+0.01+0.006
}
# before MODEL NAME METHODS SHRUNK
before() {
    model=$1 name=$2 methods=$3 shrunk=$4
    for tokens in 1 2 8 32; do
        compress "$name/voco$tokens" --model "$model" --method voco --option num_tokens=$tokens \
            --steps 1000
    done
    compress "$name/prumerge+lora" --model "$model" --method prumerge+ --steps 500
    $PYTHON -m atp_patch.evaluate --model "$model" \
        --methods "prumerge+:0.25,$methods,downsample:$shrunk" --budgets 0.25 --adapters \
        "$(trained "$name/voco1" "$name/voco2" "$name/voco8" "$name/voco32" "$name/prumerge+lora")" \
        --questions 500 --seeds 3 --out "$OUT/$name"
}
[ $# -gt 0 ] || set -- sixths quarters tables longer choices turned compressed
for part in "$@"; do "$part"; done
