#!/bin/sh
# Measures what docs/results.md reads of methods that need no training; train.sh measures the
# others. A killed run goes on where it was.
#   results/run.sh [builtin|shifted|depth|dynamic|every|together|allocation|budgets|fifth|bench]...
#   (default: the first five; "together" is one table a model of all that was measured, trained or not;
#   "bench" measures time, so that nothing else may run beside it)
# PYTHON is the interpreter; the folder that results go to may be given as OUT.
set -eu
PYTHON=${PYTHON:-python}
OUT=${OUT:-$(dirname "$0")}
EVALUATE="$PYTHON -m atp_patch.evaluate"

# Inside the decoder: before the paper's layers, or the scaled ones, and before others ("+" between
# them) at budgets that those cannot or can hardly meet.
inside() {
    for name in atp fixed fastv sparsevlm random uniform; do
        printf '%s:0.5+0.25+0.15,' "$name"
        [ "$1" = - ] || printf '%s@%s:0.25+0.15+0.06,' "$name" "$1"
    done
    printf 'prumerge+/atp:0.5+0.25+0.15,'
    [ "$1" = - ] || printf 'prumerge+/atp@%s:0.06,' "$1"
}
# Chosen on development questions among fourteen sets of layers (docs/results.md).
EARLY=1+4+10
BEFORE=prumerge,prumerge+,downsample

builtin() {
    $EVALUATE --methods "$(inside $EARLY)$BEFORE" --budgets 0.5,0.25,0.15,0.06 \
        --questions 500 --seeds 3 --out "$OUT/builtin"
}
shifted() {
    $EVALUATE --methods atp,fixed,fastv,sparsevlm,prumerge+,downsample --budgets 0.25 \
        --tasks dense,slanted,offgrid,shades --questions 200 --seeds 3 --no-plots --out "$OUT/shifted"
}
depth() {
    $EVALUATE --methods atp --budgets 0.25 --drop-from all --questions 200 --seeds 1 \
        --out "$OUT/depth"
}
dynamic() {
    $EVALUATE --model builtin-dynamic --methods "$(inside -)$BEFORE" \
        --budgets 0.5,0.25,0.15,0.06 --questions 500 --seeds 3 --out "$OUT/dynamic"
}
# Methods that "builtin" and "dynamic" leave out, with atp and the baselines to pair them with, and
# one table of all. Layers behind one that works, because a method looks at the attention before it.
every() {
    every_of builtin builtin every 1+4+10 4+14+24 14 7+14+24
    every_of builtin-dynamic dynamic every-dynamic 1+4+6 1+4+6 4 2+4+6
}
# $1: the model; $2: the folder of its other methods; $3: of these; layers: $4; $5 at a half of the
# tokens; $6 of vscan; $7 of pyramiddrop, which before the layers of fastv is the same as fastv.
every_of() {
    mkdir -p "$OUT/$3"
    methods=
    for name in atp dart random uniform; do
        methods="$methods$name@$4:0.25+0.15+0.06,$name@$5:0.5,"
    done
    methods="${methods}pyramiddrop@$7:0.5,vscan@$6,cdpruner,divprune,scope,fastervlm,visionzip"
    methods="$methods,vispruner,hiprune,prunesid,downsample"
    $EVALUATE --model "$1" --methods "$methods" --budgets 0.5,0.25,0.15,0.06 \
        --questions 500 --seeds 1 --out "$OUT/$3"
    older=
    for name in fixed fastv sparsevlm; do
        older="$older,$name@$4:0.25+0.15+0.06,$name@$5:0.5"
    done
    $PYTHON "$(dirname "$0")/choosing.py" --model "$1" --rounds 5 --budgets 0.5,0.25,0.15,0.06 \
        --methods "$methods$older,prumerge,prumerge+" --json "$OUT/$3/choosing.json"
    $PYTHON "$(dirname "$0")/frontier.py" "$OUT/$3" "$OUT/$2" \
        --choosing "$OUT/$3/choosing.json" > "$OUT/$3/frontier.md"
}
# The papers' 192, 128 and 64 of 576 tokens, which enter the decoder.
budgets() {
    $EVALUATE --methods "divprune,cdpruner,scope,fastervlm,visionzip,vispruner,hiprune,prunesid" \
        --layers 1,4,10 --budgets 0.333333,0.222222,0.111111 --questions 500 --seeds 1 --no-plots \
        --out "$OUT/budgets"
}
# The second model at a fifth of its tokens, beside the thresholds that learned there (train.sh).
fifth() {
    $EVALUATE --model builtin-dynamic --budgets 0.2 --questions 500 --seeds 1 --no-plots \
        --methods "atp@1+4+6,divprune,vispruner,scope,cdpruner,prunesid,dart@1+4+6" \
        --out "$OUT/fifth"
}
together() {
    $EVALUATE --summaries "$OUT/builtin,$OUT/thresholds-15,$OUT/thresholds-25,$OUT/compressed" \
        --out "$OUT/together"
    $EVALUATE --model builtin-dynamic --out "$OUT/together-dynamic" \
        --summaries "$OUT/dynamic,$OUT/tables,$OUT/longer,$OUT/compressed-dynamic"
}
# What each task would be given if its name were known: an upper reference.
allocation() {
    for split in development test; do
        $EVALUATE --methods "atp@$EARLY" --split $split --questions 500 --seeds 1 --no-plots \
            --budgets 0.5,0.4,0.3,0.25,0.2,0.15,0.12,0.1,0.08,0.06,0.05,0.04 \
            --out "$OUT/allocation-$split"
    done
    for tokens in 144 86.4; do
        $PYTHON "$(dirname "$0")/allocation.py" "$OUT/allocation-development/summary.jsonl" \
            "$OUT/allocation-test/summary.jsonl" --target-tokens $tokens
    done > "$OUT/allocation.md"
}
# The full depth of LLaVA-1.5-7B (17 GB of memory), then parts of it and of others.
bench() {
    mkdir -p "$OUT/bench"
    drawn table6 --preset llava-1.5-7b --layers 4,14,24 --methods atp,fastv@2 \
        --target-tokens 144 --runs 5 --decode-tokens 4
    drawn batches --preset llava-1.5-7b --scale 0.125 --target-tokens 250 \
        --batch-size 1,2,4,8,16,32 --runs 3
    drawn qwen2-vl --preset qwen2-vl-7b --scale 0.25 --methods atp,fastv@1 --keep 0.5 \
        --image 448x448,896x672,1344x1008 --runs 3 --decode-tokens 4
    drawn internvl --preset internvl-8b --scale 0.25 --methods atp,fastv@1 --keep 0.5 \
        --runs 3 --decode-tokens 4
    timed training --train --preset llava-1.5-7b --scale 0.125 --runs 5
    timed follow-up --follow-up 1,2,8,32 --preset llava-1.5-7b --scale 0.125 --runs 5
}
drawn() { timed "$@" --plot "$OUT/bench/$1.png"; }
timed() {
    name=$1
    shift
    $PYTHON -m atp_patch.bench "$@" --dtype bfloat16 --json "$OUT/bench/$name.json" \
        > "$OUT/bench/$name.md"
    cat "$OUT/bench/$name.md"
}

[ $# -gt 0 ] || set -- builtin shifted depth dynamic every
for part in "$@"; do "$part"; done
