#!/usr/bin/env bash
# Tests and benchmarks on a machine with a GPU and no network: OUT=FOLDER bash benchmarks/gpu_check.sh [PART …]
# PART is tests or benchmark; without any, both run.
#
# Python there has PyTorch, Lightning, transformers and pytest. What it lacks lies in .whl/ as wheels.
# FOLDER gets tests.log, benchmark.log, results_gpu.json and gpu.md. Both parts run, whatever the other does.
# Copy results_gpu.json to benchmarks/, and `python -m benchmarks --stored` writes docs/performance.md anew.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:?expected a folder for logs and tables}
packages=$(mktemp -d)
mkdir -p "$out"
trap 'rm -rf "$packages"' EXIT

if compgen -G '.whl/*.whl' >/dev/null; then
  python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$packages" .whl/*.whl || exit 1
fi
export PYTHONPATH="$packages:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 WANDB_MODE=offline PYTHONUNBUFFERED=1
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
export TORCHINDUCTOR_CACHE_DIR="$packages/inductor" TRITON_CACHE_DIR="$packages/triton"

# Logs that are kept name no folder of this machine.
python=$(python3 -c 'import sys; print(sys.prefix)')
shorten() { sed -u -e "s#$packages#SITE#g" -e "s#$PWD#.#g" -e "s#$python#PYTHON#g"; }

parts=" ${*:-tests benchmark} "
failed=0

if [[ $parts == *" tests "* ]]; then
  echo "== tests"
  timeout --kill-after=10 "${TEST_SECONDS:-180}" python3 -m pytest tests/test_gpu.py -m gpu -q -p no:cacheprovider \
    --durations=15 --tb=short -o log_cli=true --log-cli-level=INFO 2>&1 | shorten >"$out/tests.log"
  tests=${PIPESTATUS[0]}
  grep -E '^(INFO +test_gpu|FAILED|ERROR|E  )|passed|failed|skipped' "$out/tests.log" | cut -c1-200 | tail -n 90
  echo "== tests ended with $tests (124: out of time)"
  [ "$tests" = 0 ] || failed=1
fi

if [[ $parts == *" benchmark "* ]]; then
  echo "== benchmark"
  timeout --kill-after=10 "${BENCHMARK_SECONDS:-270}" python3 -m benchmarks gpu --output "$out" 2>&1 |
    shorten >"$out/benchmark.log"
  benchmark=${PIPESTATUS[0]}
  grep -E 'benchmarks.gpu:gpu: ' "$out/benchmark.log" | cut -c1-200 | tail -n 20
  [ -f "$out/gpu.md" ] && cat "$out/gpu.md"
  echo "== the benchmark ended with $benchmark (124: out of time)"
  [ "$benchmark" = 0 ] || failed=1
fi
exit $failed
