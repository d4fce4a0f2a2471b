#!/usr/bin/env bash
# Measures what docs/performance.md shows, in about half an hour of an idle CPU with 16 GB of memory:
#
#     OUT=results/performance results/performance.sh [PART...]
#
# Parts run in the order in which they are named, all of them by default, each with a limit of its
# own, and each writes JSON to OUT. PEERS is the Python of `make peers-env`, and ANGELSLIM a checkout
# of its repository; without them the peers are left out. TRY=1 tries every part with tiny models.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-results/performance}
PYTHON=${PYTHON:-python}
PEERS=${PEERS:-.venv-peers/bin/python}
ANGELSLIM=${ANGELSLIM:-}
TRY=${TRY:-}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} PYTHONPATH=$PWD
mkdir -p "$OUT"

part() {
    name=$1 seconds=$2
    shift 2
    echo "== $name, $(date +%T), $(cut -d' ' -f1-3 /proc/loadavg)"
    timeout "$seconds" "$@" > "$OUT/$name.md" 2> "$OUT/$name.err" || echo "$name ended with $?"
}
bench() {
    name=$1 seconds=$2
    shift 2
    part "$name" "$seconds" $PYTHON -m atp_patch.bench --device cpu --dtype bfloat16 --decode-tokens 0 \
        --quiet --json "$OUT/$name.json" "$@"
}

# Two decoder layers of InternVL-8B; half of what comes to the second one, or to the first, stays.
every=atp,fixed,fastv,sparsevlm,pyramiddrop,dart,prumerge,prumerge+,fastervlm,visionzip,divprune
every=$every,scope,cdpruner,vispruner,hiprune,prunesid,vscan,random,uniform,downsample
tiled=(--preset internvl-8b --scale 0.0714 --keep 0.25)
llava=(--preset llava-1.5-7b) small=448x448,896x448,896x896 middle=448x448,896x896,1792x1792
large=3584x3584 largest=7168x3584 shape=llava-1.5-7b qwen=qwen2.5-vl-7b scale=0.125
if [ -n "$TRY" ]; then
    tiled=(--preset tiny) llava=(--preset tiny) every=atp,divprune
    small=336x336 middle=336x336 large=336x336 largest=336x336 shape=tiny qwen=tiny-qwen scale=0.5
fi

growth() { bench growth 400 "${tiled[@]}" --methods $every --image $middle --runs 1; }
growth16k() { bench growth16k 330 "${tiled[@]}" --methods atp,fastv,divprune --image $large --runs 1; }
growth32k() { bench growth32k 420 "${tiled[@]}" --methods atp,divprune --image $largest --runs 1; }
batches() {
    bench batches 300 "${llava[@]}" --scale 0.0625 --methods atp --keep 0.25 --batch-size 1,8,32 --runs 2
}
share() { bench share 90 "${llava[@]}" --scale 0.125 --keep 0.5 --methods atp,fastv,random --runs 5; }
ratios() {
    for keep in 1 0.5 0.25 0.1 0.05; do
        bench "ratio-$keep" 90 "${tiled[@]}" --keep $keep --methods atp,divprune --image ${small##*,} --runs 2
    done
}
hooks() {
    for model in $shape tiny; do
        part "hooks-$model" 60 $PYTHON results/overhead.py --preset $model --dtype bfloat16 \
            --runs 9 --json "$OUT/hooks-$model.json"
    done
    for model in builtin builtin-dynamic; do
        part "hooks-$model" 60 $PYTHON results/overhead.py --builtin $model --runs 15 \
            --json "$OUT/hooks-$model.json"
    done
}
load() {
    part load 240 $PYTHON results/arrival.py --preset $shape --json "$OUT/load.json" ${TRY:+--requests 4}
}
choosing() {
    [ -n "$TRY" ] || part choosing-4096 150 $PYTHON results/choosing.py --greedy --rounds 2 \
        --json "$OUT/choosing-4096.json"
    part choosing-576 120 $PYTHON results/choosing.py --budgets 0.25 --rounds ${TRY:-5} \
        --json "$OUT/choosing-576.json"
}
peers() {
    [ -x "$PEERS" ] || { echo "no peers: $PEERS is missing"; return; }
    models=($shape $qwen)
    [ -z "$TRY" ] || models=(tiny-llava tiny-qwen)
    for model in "${models[@]}"; do
        part "peers-$model" 150 "$PEERS" results/peers.py --preset $model --scale $scale --runs 2 \
            --decode-tokens 4 ${ANGELSLIM:+--angelslim "$ANGELSLIM"} --json "$OUT/peers-$model.json"
    done
}

[ $# -gt 0 ] || set -- growth batches share peers hooks growth16k load choosing ratios growth32k
for name in "$@"; do "$name"; done
