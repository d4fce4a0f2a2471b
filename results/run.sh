#!/bin/sh
# Measures what docs/results.md reads of methods that need no training; train.sh measures the
# others. A killed run goes on where it was.
#   results/run.sh [builtin|shifted|depth|dynamic|together|allocation]...
#   (default: the first four; "together" is one table a model of all that was measured, trained or not)
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
together() {
    $EVALUATE --summaries "$OUT/builtin,$OUT/thresholds-15,$OUT/thresholds-25" \
        --out "$OUT/together"
    $EVALUATE --model builtin-dynamic --summaries "$OUT/dynamic,$OUT/tables,$OUT/longer" \
        --out "$OUT/together-dynamic"
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

[ $# -gt 0 ] || set -- builtin shifted depth dynamic
for part in "$@"; do "$part"; done
