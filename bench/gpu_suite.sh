#!/usr/bin/env bash
# CUDA tests, benchmark and a short search on a machine with a GPU and nothing to install; JSON and logs in $OUT.
#   bash bench/gpu_suite.sh [STAGE...]   OUT: folder (default bench/results/gpu), PYTHON: interpreter (default python3)
# Stages: build tests sanitize bench step search. All together end within ten minutes; the ones that are named share as
# much. Each has its own time limit and runs whatever became of the others; sanitize needs NVIDIA's compute-sanitizer,
# and says so where it is absent. Exit status 0: all but the build passed.
set -u -o pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results/gpu}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$OUT" || exit 2
run_dir=$(mktemp -d)/search
wanted=" ${*:-build tests sanitize bench step search} "
share=$(($# ? 575 / $# : 0))
for name in $wanted; do
  [[ " build tests sanitize bench step search " == *" $name "* ]] || {
    echo "stage: expected some of build tests sanitize bench step search, got $name" >&2
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

sanitizer() { # where compute-sanitizer is
  command -v compute-sanitizer || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer"
}

"$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || {
  echo "$PYTHON finds no torch with a CUDA device: this suite needs both" >&2
  exit 2
}
# setup.py succeeds without a compiler too, so the stage looks for what it should have left.
# shellcheck disable=SC2016 # $0 is the inner shell's
stage build 90 bash -c '"$0" setup.py build_ext --inplace && ls dssp_kernels/_cpu*.so' "$PYTHON" ||
  echo "== build: no C++ kernels; CPU tensors run on the reference backend, GPU tensors are not affected"
stage tests 165 "$PYTHON" -m pytest tests/gpu -m gpu -q || failed=1
if [[ $wanted != *" sanitize "* ]]; then
  :
elif tool=$(sanitizer); then
  rm -f "$OUT/compute-sanitizer.log"
  # Without torch's cache, memory ends where its tensor does, so that an access beyond it is one.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  stage sanitize 65 "$tool" --tool memcheck --error-exitcode 9 --log-file "$OUT/compute-sanitizer.log" \
    "$PYTHON" -m pytest tests/gpu -m gpu -q -k "(nothing_outside or nothing_beside or start_between) and not 1000003" ||
    failed=1
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
  [[ ! -f $OUT/compute-sanitizer.log ]] || cat "$OUT/compute-sanitizer.log"
else
  note sanitize absent 127 0
  echo "== sanitize: no compute-sanitizer on PATH or in \$CUDA_HOME/bin; the kernels' memory accesses were not checked"
fi
stage bench 135 "$PYTHON" bench/edge_throughput.py --device cuda --quick --dtypes float32 bfloat16 --out "$OUT" || failed=1
stage step 70 "$PYTHON" bench/search_step.py --device cuda --quick --out "$OUT" || failed=1
stage search 50 "$PYTHON" -m dssp.search --dataset digits --device cuda --epochs 4 --run-dir "$run_dir" || failed=1
[[ ! -f $run_dir/summary.json ]] || cp "$run_dir/summary.json" "$OUT/search_summary.json"

(
  IFS=,
  printf '{"passed": %s, "stages": {%s}}\n' "$([[ $failed == 0 ]] && echo true || echo false)" "${stages[*]}"
) >"$OUT/summary.json.tmp" && mv "$OUT/summary.json.tmp" "$OUT/summary.json"
cat "$OUT/summary.json"
echo "Results in $OUT; run folder of the search in $run_dir"
exit "$failed"
