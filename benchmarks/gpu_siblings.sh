#!/usr/bin/env bash
# Train the embedded model's siblings on a GPU machine without a network: bash benchmarks/gpu_siblings.sh [MINUTES [BATCH]]
#
# The denoisers train one after the other, each for MINUTES (default 2) in batches of BATCH (default 512). The folder
# CARRIED (default work/gpu_siblings) holds the art (sprites.safetensors.xz), the list of English words (words.json) and
# T5's tokenizer (tokenizer_3), which a machine with a network has made. Text encoders in it (t5.safetensors,
# clip_2.safetensors) are not trained again. Wheels of missing packages lie in .whl. Weights and log go to OUT.
set -uo pipefail
MINUTES=${1:-2} BATCH=${2:-512}
CARRIED=${CARRIED:-work/gpu_siblings} OUT=${OUT:-runs/gpu_siblings} WORK=${WORK:-/tmp/siblings_work}
export HF_HUB_OFFLINE=1 WANDB_MODE=offline PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1
mkdir -p "$OUT" "$WORK/siblings"
started=$SECONDS
if [ -d .whl ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl
    export PYTHONPATH=/tmp/site:.
fi
python3 -c 'import lzma, sys; sys.stdout.buffer.write(lzma.open(sys.argv[1]).read())' \
    "$CARRIED/sprites.safetensors.xz" > "$WORK/sprites.safetensors"
cp -r "$CARRIED"/{words.json,tokenizer_3} "$WORK/siblings/"
cp "$CARRIED"/{t5,clip_2}.safetensors "$WORK/siblings/" 2> /dev/null
train() {
    python3 -m trce_lightning.emoji.training --folder "$WORK" --family sd3 --family xl --family flux \
        data encoders denoiser --batch-size "$BATCH" --minutes "$MINUTES" --steps 1000000 --lr 2e-3 "$@"
}
# A step that a CUDA graph can't hold is launched kernel by kernel, which is slower.
{ train || train --eager; } 2>&1 | tee "$OUT/log.txt" | grep -E "loss|steps of|captions|Error|encoding"
cp "$WORK"/siblings/{xl,sd3,flux,t5,clip_2}.safetensors "$OUT"
echo "$((SECONDS - started)) s in all, $(nvidia-smi --query-gpu=name --format=csv,noheader)" | tee -a "$OUT/log.txt"
