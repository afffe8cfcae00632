#!/usr/bin/env bash
# Train the embedded model's siblings on a GPU machine without a network: bash benchmarks/gpu_siblings.sh [MINUTES] [BATCH]
#
# All three denoisers train at the same time for MINUTES (default 4) in batches of BATCH (default 512). The folder
# CARRIED (default work/gpu_siblings) holds the art (sprites.safetensors.xz), the list of English words (words.json) and
# T5's tokenizer (tokenizer_3), which a machine with a network has made. Text encoders in it (t5.safetensors,
# clip_2.safetensors) are not trained again. Wheels of missing packages lie in .whl. The weights, a picture of each
# sibling and the logs go to OUT.
set -uo pipefail
MINUTES=${1:-4} BATCH=${2:-512} OPTIONS=${3:-}
CARRIED=${CARRIED:-work/gpu_siblings} OUT=${OUT:-runs/gpu_siblings} WORK=${WORK:-/tmp/siblings_work}
export HF_HUB_OFFLINE=1 WANDB_MODE=offline PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=true TQDM_DISABLE=1
mkdir -p "$OUT" "$WORK/siblings"
started=$SECONDS
say() { echo "[$((SECONDS - started)) s] $*"; }
if [ -d .whl ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl
    export PYTHONPATH=/tmp/site:.
fi
python3 -c 'import lzma, sys; sys.stdout.buffer.write(lzma.open(sys.argv[1]).read())' \
    "$CARRIED/sprites.safetensors.xz" > "$WORK/sprites.safetensors"
cp -r "$CARRIED"/{words.json,tokenizer_3} "$WORK/siblings/"
cp "$CARRIED"/{t5,clip_2}.safetensors "$WORK/siblings/" 2> /dev/null
train() { python3 -m trce_lightning.emoji.training --folder "$WORK" "$@"; }
say "data"
train --family xl data > "$OUT/log.txt" 2>&1
say "encoders"
train --family xl encoders --batch-size "$BATCH" > "$WORK/clip_2.log" 2>&1 &
train --family flux encoders --batch-size "$BATCH" > "$WORK/t5.log" 2>&1 &
wait
say "denoisers"
for family in xl sd3 flux; do
    # shellcheck disable=SC2086  # OPTIONS are words
    train --family $family denoiser check --batch-size "$BATCH" --minutes "$MINUTES" --steps 1000000 --lr 2e-3 \
        $OPTIONS > "$WORK/$family.log" 2>&1 &
done
wait
say "done"
cat "$WORK"/*.log >> "$OUT/log.txt"
cp "$WORK"/siblings/{xl,sd3,flux,t5,clip_2}.safetensors "$OUT"
(cd "$WORK/siblings" && tar cf - ./*.png tokenizer_3) > "$OUT/rest.tar"
nvidia-smi --query-gpu=name,memory.used --format=csv,noheader >> "$OUT/log.txt"
grep -E "loss|steps of|%|Error|captions" "$OUT/log.txt" | tail -n 60
