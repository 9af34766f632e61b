#!/usr/bin/env bash
# CUDA tests, benchmark and a short search on a machine with a GPU and nothing to install; JSON and logs in $OUT.
#   bash bench/gpu_suite.sh [STAGE...]   OUT: folder (default bench/results/gpu), PYTHON: interpreter (default python3)
# Stages: build tests bench step search. All together end within ten minutes; the ones that are named share as much.
# Each has its own time limit and runs whatever became of the others. Exit status 0: all but the build passed.
set -u -o pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results/gpu}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$OUT" || exit 2
run_dir=$(mktemp -d)/search
wanted=" ${*:-build tests bench step search} "
share=$(($# ? 580 / $# : 0))
for name in $wanted; do
  [[ " build tests bench step search " == *" $name "* ]] || {
    echo "stage: expected some of build tests bench step search, got $name" >&2
    exit 2
  }
done
stages=()
failed=0

note() { # name, status, exit code, seconds: one entry of summary.json
  stages+=("\"$1\": {\"status\": \"$2\", \"exit_code\": $3, \"seconds\": $4}")
  echo "== $1: $2 (exit code $3, $4 s)"
}

stage() { # name, limit in seconds, command...
  local name=$1 limit=$2 started=$SECONDS code status=failed
  shift 2
  [[ $wanted == *" $name "* ]] || return 0
  [[ $share == 0 ]] || limit=$share
  echo "== $name: $*"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) status=passed ;;
    124 | 137) status="out of time" ;;
  esac
  note "$name" "$status" "$code" "$((SECONDS - started))"
  return "$code"
}

"$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || {
  echo "$PYTHON finds no torch with a CUDA device: this suite needs both" >&2
  exit 2
}
# setup.py succeeds without a compiler too, so the stage looks for what it should have left.
# shellcheck disable=SC2016 # $0 is the inner shell's
stage build 90 bash -c '"$0" setup.py build_ext --inplace && ls dssp_kernels/_cpu*.so' "$PYTHON" ||
  echo "== build: no C++ kernels; CPU tensors run on the reference backend, GPU tensors are not affected"
stage tests 190 "$PYTHON" -m pytest tests/gpu -m gpu -q || failed=1
stage bench 150 "$PYTHON" bench/edge_throughput.py --device cuda --quick --dtypes float32 bfloat16 --out "$OUT" || failed=1
stage step 90 "$PYTHON" bench/search_step.py --device cuda --quick --out "$OUT" || failed=1
stage search 60 "$PYTHON" -m dssp.search --dataset digits --device cuda --epochs 4 --run-dir "$run_dir" || failed=1
[[ ! -f $run_dir/summary.json ]] || cp "$run_dir/summary.json" "$OUT/search_summary.json"

(
  IFS=,
  printf '{"passed": %s, "stages": {%s}}\n' "$([[ $failed == 0 ]] && echo true || echo false)" "${stages[*]}"
) >"$OUT/summary.json.tmp" && mv "$OUT/summary.json.tmp" "$OUT/summary.json"
cat "$OUT/summary.json"
echo "Results in $OUT; run folder of the search in $run_dir"
exit "$failed"
