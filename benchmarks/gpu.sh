#!/usr/bin/env bash
# GPU tests and every benchmark on one NVIDIA GPU, in one command. Results as JSON under $OUT (default: runs/gpu).
#     bash benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu}
mkdir -p "$OUT"
export HF_HUB_OFFLINE=1 PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}"
failed=0
part() {  # name, command …: the output goes to a log, and a failure does not stop the other parts
    local name=$1; shift
    echo "== $name: $*"
    "$@" 2>&1 | tee "$OUT/$name.log" || { failed=1; echo "== $name FAILED"; }
}
part tests python3 -m pytest -m gpu tests
part step python3 benchmarks/step.py --out "$OUT/step.json"
part step-large python3 benchmarks/step.py --prompts 16 --group 16 --micro 256 --out "$OUT/step-large.json"
part train python3 -m gcpo_t2i train --output_dir "$OUT/run" --overwrite
cp "$OUT/run/metrics.jsonl" "$OUT/train-metrics.jsonl" 2>/dev/null
rm -rf "$OUT/run"
python3 - "$OUT" <<'PY'
import json, sys, pathlib, torch, transformers
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
facts = {"device": device, "torch": torch.__version__, "transformers": transformers.__version__, "cuda": torch.version.cuda}
pathlib.Path(sys.argv[1], "device.json").write_text(json.dumps(facts, indent=2))
print(facts)
PY
exit $failed
