#!/usr/bin/env bash
# Train denoisers of the embedded model's siblings on a GPU machine without a network:
#     bash benchmarks/gpu_siblings.sh FAMILY [SECONDS [BATCH]]
#
# The text encoders are those that ship; with ENCODERS=train they are trained first. Some kernels may fail on a GPU. So a
# few steps are tried first with each of several, side by side and beside the data. The first in KERNELS that works trains
# for SECONDS (default 110). If it dies, the next one goes on from the last checkpoint. BATCH is 512 if it isn't given.
# The folder CARRIED (default work/gpu_siblings) holds what a machine with a network has made: sprites.safetensors.xz and
# words.json. Wheels of missing packages lie in .whl. OUT gets the weights (FAMILY.safetensors), their average so far
# (FAMILY-average.safetensors), pictures, log.txt and kernels.txt, which has the traceback of each probe that failed.
set -uo pipefail
FAMILY=$1 LIMIT=${2:-110} BATCH=${3:-512}
KERNELS=${KERNELS:-default no-cudnn written-out cublaslt} LATER=${LATER:-math workspace eager tf32 plain}
CARRIED=${CARRIED:-work/gpu_siblings} OUT=${OUT:-runs/gpu_siblings} WORK=${WORK:-/tmp/siblings_work}
STEPS=${STEPS:-1000000}
export HF_HUB_OFFLINE=1 WANDB_MODE=offline PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
SECONDS=0
parts=$WORK/siblings shipped=trce_lightning/emoji/weights/siblings
mkdir -p "$OUT" "$parts"
python=${PYTHON:-python3}
if [ -d .whl ] && [ -z "${PYTHON:-}" ]; then
    $python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl
    export PYTHONPATH=/tmp/site:.
fi
$python -c 'import lzma, sys; sys.stdout.buffer.write(lzma.open(sys.argv[1]).read())' \
    "$CARRIED/sprites.safetensors.xz" > "$WORK/sprites.safetensors"
cp -r "$CARRIED/words.json" "$shipped/tokenizer_3" "$parts/"
[ "${ENCODERS:-ship}" = train ] || cp "$shipped"/{t5,t5_flux,clip_2}.safetensors "$parts/"
say() { echo "$(printf %4d $SECONDS) s: $*" | tee -a "$OUT/log.txt"; }
part() {
    $python -m trce_lightning.emoji.training --family "$FAMILY" --folder "$WORK" --batch-size "$BATCH" --lr 2e-3 \
        --steps "$STEPS" "$@"
}
keep() {
    cp -u "$parts/checkpoints/$FAMILY-average.safetensors" "$OUT" 2> /dev/null
    cp -u "$parts/$FAMILY".{safetensors,png} "$OUT" 2> /dev/null
    [ "${ENCODERS:-ship}" = train ] && cp -u "$parts"/{t5,t5_flux,clip_2}.safetensors "$OUT" 2> /dev/null
}
working=()
# try NAME…: probe these kernels side by side, and add those that work to ``working``
try() {
    local name pids=()
    for name in "$@"; do
        timeout -k 2 "${PROBE_SECONDS:-90}" bash -c "$(declare -f part); part probe --kernels $name" > "$WORK/$name.log" 2>&1 &
        pids+=("$name:$!")
    done
    for pair in "${pids[@]}"; do
        name=${pair%:*}
        wait "${pair#*:}"
        local code=$?
        say "kernels $name: exit $code, $(grep -cE '^[0-9:]+ .*steps of' "$WORK/$name.log") fits done"
        { echo "=== $name: exit $code"; cat "$WORK/$name.log"; } >> "$OUT/kernels.txt"
        [ $code -eq 0 ] && [ "$name" != blocking ] && working+=("$name")
    done
}
export FAMILY WORK BATCH STEPS python
say "begins, $(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null || echo no GPU)"
part data > "$WORK/data.log" 2>&1 &
data=$!
have_data() { wait $data || { tail -n 20 "$WORK/data.log" | tee -a "$OUT/log.txt"; say "no data"; exit 1; }; }
if [ "${ENCODERS:-ship}" = train ]; then
    have_data
    part encoders 2>&1 | tee -a "$OUT/log.txt" | grep -E "on captions|steps of|Error"
    say "text encoders: $(cd "$parts" && ls ./*.safetensors)"
fi
try $KERNELS blocking
[ ${#working[@]} -gt 0 ] || try $LATER
have_data
say "data is there; kernels that work: ${working[*]}"
while sleep 5; do keep; done > /dev/null 2>&1 &
keeper=$!
# A dozen seconds go to the start of Python.
for kernels in "${working[@]}"; do
    timeout -k 5 $((LIMIT + 60)) bash -c "$(declare -f part); part denoiser --kernels $kernels --minutes $(awk "BEGIN { print ($LIMIT + 12) / 60 }")" \
        2>&1 | tee -a "$OUT/log.txt" | grep -E "loss|steps of|Error"
    [ -f "$parts/$FAMILY.safetensors" ] && break
    say "kernels $kernels failed in training"
done
keep
[ -f "$parts/$FAMILY.safetensors" ] && timeout -k 5 "${CHECK_SECONDS:-60}" bash -c "$(declare -f part); part check" 2>&1 | tee -a "$OUT/log.txt" | tail -n 5
kill $keeper
keep
say "ends"
[ -f "$OUT/$FAMILY.safetensors" ]
