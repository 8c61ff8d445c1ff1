#!/usr/bin/env bash
# The GPU tests and every benchmark on one NVIDIA GPU, part by part. Results as JSON and logs under $OUT (default: runs/gpu).
#     bash benchmarks/gpu.sh                      # all parts; those whose result is there already are left out
#     bash benchmarks/gpu.sh rollout-1b-16 step-7b  # these parts, whether they are there or not
# No part is started after $LIMIT seconds (default: 480, so that all is over within 9 minutes); the same command goes on.
# SMALL=1 runs every part in tiny sizes, on a CPU as well: it says whether the script works, and nothing else.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu} LIMIT=${LIMIT:-480} SMALL=${SMALL:-}
mkdir -p "$OUT"
export HF_HUB_OFFLINE=1 PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=$(command -v python3 || command -v python)
wanted=("$@") failed=() left=()

part() {  # name, command …: a failure does not stop the other parts
    local name=$1; shift
    if ((${#wanted[@]})); then [[ " ${wanted[*]} " == *" $name "* ]] || return 0
    elif [[ -e $OUT/$name.done ]]; then return 0; fi
    if ((SECONDS > LIMIT)); then left+=("$name"); return 0; fi
    echo "== $name, after $SECONDS s: $*"
    if "$@" 2>&1 | tee "$OUT/$name.log"; then touch "$OUT/$name.done"; else failed+=("$name"); fi
}

bench() {  # name, options …: bench.json becomes $OUT/NAME.json
    local name=$1; shift
    if [[ $SMALL ]]; then  # later options win
        set -- "$@" --prompts 1 --group_size 2 --repeats 1
        set -- "${@//janus_pro_[17]b/small_janus}"
    fi
    "$python" -m gcpo_t2i bench "$@" --out "$OUT/bench-$name" --overwrite || return 1
    cp "$OUT/bench-$name/bench.json" "$OUT/$name.json"
    if [[ -e $OUT/bench-$name/scaling.png ]]; then cp "$OUT/bench-$name/scaling.png" "$OUT/$name.png"; fi
    rm -r "$OUT/bench-$name"
}

train() {
    local small=()
    if [[ $SMALL ]]; then small=(--steps 2 --prompts_per_step 2 --group_size 2 --eval.num_prompts 6 --eval.samples_per_prompt 1); fi
    "$python" -m gcpo_t2i train --output_dir "$OUT/run" --overwrite "${small[@]}" || return 1
    cp "$OUT/run/metrics.jsonl" "$OUT/train.jsonl"
    rm -r "$OUT/run"
}

"$python" -m gcpo_t2i env --json > "$OUT/env.json"
part tests "$python" -m pytest -o addopts="--strict-markers" -m gpu tests  # one process: they share the GPU
part log-probs bench log-probs --what log_probs --repeats 3
part rollout-1b-16 bench rollout-1b-16 --what rollout --shape janus_pro_1b --prompts 1 --group_size 16 --rivals library --repeats 2
part rollout-7b-16 bench rollout-7b-16 --what rollout --shape janus_pro_7b --prompts 1 --group_size 16 --rivals library --repeats 1
part step-7b bench step-7b --what step --shape janus_pro_7b --prompts 1 --group_size 16 --lora_rank 32 --rivals '[]' --repeats 2
part rollout-1b-64 bench rollout-1b-64 --what rollout --shape janus_pro_1b --prompts 4 --group_size 16 --rivals library --repeats 1
part rollout-7b-64 bench rollout-7b-64 --what rollout --shape janus_pro_7b --prompts 4 --group_size 16 --rivals library --repeats 1
part step-1b bench step-1b --what step --shape janus_pro_1b --prompts 1 --group_size 16 --rivals plain --repeats 1
part step bench step --what rollout step --prompts 8 --group_size 8 --repeats 3
part scaling bench scaling --what scaling --shape janus_pro_1b --prompts 1 --group_size 16
part train train
echo "== $SECONDS s; results in $OUT"
if ((${#left[@]})); then echo "== left for the next call: ${left[*]}"; fi
if ((${#failed[@]})); then echo "== FAILED: ${failed[*]}"; exit 1; fi
