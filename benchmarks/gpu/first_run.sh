#!/bin/bash
# The first run on a GPU, in one command and within 590 s: correctness first, three at once, then timings with the GPU to
# itself. Run from the repository's root on a machine with torch, Triton and transformers, and no network:
#     OUT=results bash benchmarks/gpu/first_run.sh
# `python -m benchmarks.gpu.prepare_rental` makes .rental beforehand: wheels, and a Triton cache. What matters is left in
# $OUT, in eight files at most. A second call continues where the first was cut off.
# REHEARSE=1: without a GPU, collect the tests and load the parts instead of running them.
set -u
: "${OUT:?name a folder for the results: OUT=results bash $0}"
PYTHON=${PYTHON:-python3}
BUDGET_S=${BUDGET_S:-590}
REHEARSE=${REHEARSE:-}
WORK=${WORK:-$HOME/first-run}  # outlives this call where the machine stays up
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TRITON_CACHE_DIR=$WORK/triton
mkdir -p "$OUT" "$WORK/suite/parts" "$WORK/triton" "$WORK/done"
say() { echo "[$SECONDS s] $*"; }
left() { echo $((BUDGET_S - 20 - SECONDS)); }

if ! [ -f "$WORK/done/unpacked" ]; then
  [ -f .rental/triton.tgz ] && tar xzf .rental/triton.tgz -C "$WORK/triton"
  [ -d .rental/suite ] && cp -rn .rental/suite/. "$WORK/suite/"
  if [ -d .rental/wheels ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$WORK/site" \
      .rental/wheels/*.whl || exit 1
  fi
  touch "$WORK/done/unpacked"
fi
export PYTHONPATH=$WORK/site:.:kernels${PYTHONPATH:+:$PYTHONPATH}
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv,noheader 2>/dev/null ||
  say "no GPU is seen by nvidia-smi"
"$PYTHON" -c 'from benchmarks.gpu.parts import versions; print(versions())'
cubins() { find "$WORK/triton" -name '*.cubin' | wc -l; }
before=$(cubins)
say "kernels prepared: $before"

# NAME SECONDS COMMAND...: once; its output in $OUT/NAME.log
checked() {
  local name=$1 seconds=$2 rc
  shift 2
  [ -n "$REHEARSE" ] && seconds=1200  # a machine without a GPU may be a slow one
  [ -f "$WORK/done/$name" ] && { say "$name: done before"; return; }
  timeout "$seconds" "$@" >"$OUT/$name.log" 2>&1
  rc=$?
  [ $rc = 0 ] && [ -z "$REHEARSE" ] && touch "$WORK/done/$name"
  say "$name rc $rc: $(tail -n 1 "$OUT/$name.log")"
}
TESTS="-q -p no:cacheprovider -m gpu ${REHEARSE:+--co}"
ON_GPU=tests/kernels/triton/test_on_gpu.py
LOAD='from benchmarks.gpu.parts import PARTS
for part in PARTS.values(): part.load()
print(len(PARTS), "parts load")'
checked kernel-tests 170 "$PYTHON" -m pytest $TESTS $ON_GPU --deselect $ON_GPU::test_every_case_of_the_suite_is_right &
checked engine-tests 190 "$PYTHON" -m pytest $TESTS tests/server/engine/model/test_on_gpu.py \
  tests/server/engine/sampling/test_sampler.py &
if [ -n "$REHEARSE" ]; then
  checked parts 170 "$PYTHON" -c "$LOAD" &
elif ! [ -f "$WORK/suite/parts/correctness.json" ]; then
  checked correctness 200 "$PYTHON" -m benchmarks.gpu.parts correctness --out "$WORK/suite" --seconds 190 &
fi
wait
grep -h "WRONG\|FAILED\|rror:" "$OUT"/*.log | head -20
say "kernels compiled here: $(($(cubins) - before))"
[ -n "$REHEARSE" ] && { say "rehearsed"; exit 0; }

# NAME SECONDS: one part of the suite, if time is left and it has not run
part() {
  local seconds=$(($2 < $(left) ? $2 : $(left)))
  [ -f "$WORK/suite/parts/$1.json" ] && { say "$1: done before"; return; }
  [ "$seconds" -lt 20 ] && { say "$1: no time is left; run the same command again"; return; }
  timeout "$seconds" "$PYTHON" -m benchmarks.gpu.parts "$1" --out "$WORK/suite" --seconds $((seconds * 9 / 10)) 2>&1 |
    tail -n 12
  say "$1 rc ${PIPESTATUS[0]}"
}
part attention 45
part nf4 45
part model 120
part model_nf4 90
if [ "$(left)" -gt 40 ]; then
  checked step-profile 60 "$PYTHON" -m benchmarks.gpu.step_profile
  cut -c1-130 "$OUT/step-profile.log"
fi
part lora 110
"$PYTHON" -m benchmarks.gpu_suite --out "$WORK/suite" --budget-s 1 --only correctness model lora nf4 model_nf4 attention |
  tail -n 24
cp "$WORK/suite/gpu_suite.json" "$WORK/suite/gpu_suite.png" "$OUT/" 2>/dev/null
say "done"
