#!/usr/bin/env bash
# Train the embedded model's siblings on a GPU machine without a network, in SECONDS in all:
#     bash benchmarks/gpu_siblings.sh [SECONDS [BATCH]]
#
# The denoisers train one after the other, in batches of BATCH (default 512), and share what the rest leaves of SECONDS
# (default 600). T5 trains beside SDXL, which doesn't read it. The folder CARRIED (default work/gpu_siblings) holds what a
# machine with a network has made: sprites.safetensors.xz, words.json, tokenizer_3, captions.safetensors.xz,
# clip_2.safetensors, and t5.safetensors in case that T5 can't be trained. Wheels of missing packages lie in .whl.
# Weights and log go to OUT.
set -uo pipefail
LIMIT=${1:-600} BATCH=${2:-512}
CARRIED=${CARRIED:-work/gpu_siblings} OUT=${OUT:-runs/gpu_siblings} WORK=${WORK:-/tmp/siblings_work}
export HF_HUB_OFFLINE=1 WANDB_MODE=offline PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
SECONDS=0
parts=$WORK/siblings
mkdir -p "$OUT" "$parts"
if [ -d .whl ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl
    export PYTHONPATH=/tmp/site:.
fi
unpack() {
    python3 -c 'import lzma, sys; sys.stdout.buffer.write(lzma.open(sys.argv[1]).read())' "$CARRIED/$1.xz" > "$2/$1"
}
unpack sprites.safetensors "$WORK"
unpack captions.safetensors "$parts"
cp -r "$CARRIED"/{words.json,tokenizer_3,clip_2.safetensors} "$parts/"
keep() { cp -u "$parts"/{sd3,xl,flux,t5,clip_2}.safetensors "$OUT" 2> /dev/null; }
while sleep 5; do keep; done > /dev/null 2>&1 &
keeper=$!
echo "begins after $SECONDS s" | tee "$OUT/log.txt"
# train LIMIT OPTION…: from now until LIMIT seconds after the beginning, of which 25 are for the start and the end
train() {
    local left=$(($1 - SECONDS))
    timeout -k 5 "$left" python3 -m trce_lightning.emoji.training --folder "$WORK" --batch-size "$BATCH" \
        --steps 1000000 --lr 2e-3 --minutes "$(awk "BEGIN { print ($left - 25) / 60 }")" "${@:2}"
}
# If a CUDA graph can't hold a step, what is left trains kernel by kernel, which is slower.
encoder() {
    train 85 --family flux encoders || train 115 --family flux encoders --eager
    [ -f "$parts/t5.safetensors" ] || cp "$CARRIED/t5.safetensors" "$parts/"
}
denoisers() { train "$LIMIT" --family xl --family sd3 --family flux data denoiser "$@"; }
encoder > "$OUT/t5.txt" 2>&1 &
{ denoisers || { [ $((LIMIT - SECONDS)) -gt 60 ] && denoisers --eager; }; } 2>&1 |
    tee -a "$OUT/log.txt" | grep -E "loss|steps of|Error|encoding"
kill $keeper
keep
grep -E "loss|steps of|captions|Error" "$OUT/t5.txt" | tail -n 12
echo "ends after $SECONDS s, $(nvidia-smi --query-gpu=name --format=csv,noheader)" | tee -a "$OUT/log.txt"
