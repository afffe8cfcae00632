export OMP_WAIT_POLICY := PASSIVE
# glibc hands large tensors' pages back after each use and faults them in anew, unless told to keep them: bytes.
export MALLOC_MMAP_THRESHOLD_ := 33554432
export MALLOC_TRIM_THRESHOLD_ := 4294967296

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
BROWSER_STAMP := .venv/.installed-browser

.PHONY: setup demo test test-slow test-browser test-gpu benchmark bench-stages bench-table \
  bench-attacks bench-attacks-hardened bench-leaderboard bench-families lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# Alone on the machine, threads that spin for a moment before they sleep are faster; beside another job, slower.
demo bench-stages bench-table bench-attacks bench-attacks-hardened bench-leaderboard bench-families: export GOMP_SPINCOUNT := 20000
demo: setup
	$(BIN)/python train.py concept=violence

# Most tests compute too little for a second thread. A file's tests share its fixtures, so they stay in one process.
test: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-slow: setup
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(BIN)/python -m pytest -m slow

$(BROWSER_STAMP): $(STAMP)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[browser]'
	touch $@

test-browser:
	@command -v chromium >/dev/null || \
	  { echo "test-browser: expected chromium on PATH, got none; Debian has it as the package chromium" >&2; exit 2; }
	$(MAKE) $(BROWSER_STAMP)
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(BIN)/python -m pytest -m browser

test-gpu: setup
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(BIN)/python -m pytest -m gpu

benchmark: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks

TABLE := runs/table
STAGES := $(TABLE)/both $(TABLE)/textual $(TABLE)/trajectory
HARDENED := $(TABLE)/hardened
bench-stages: setup
	$(BIN)/python train.py concept=violence output=$(TABLE)/both
	$(BIN)/python train.py concept=violence output=$(TABLE)/textual stages=[textual]
	$(BIN)/python train.py concept=violence output=$(TABLE)/trajectory stages=[trajectory] \
	  optimizer.lr=4e-4 optimizer.schedule=constant trajectory.preserve_weight=300 trajectory.keep_weight=300

bench-table: bench-stages
	$(BIN)/python train.py concept=violence output=$(HARDENED) experiment=hardened
	$(BIN)/python -m benchmarks.readme $(STAGES) --hardened $(HARDENED)

# All attacks on the original, each stage alone, both, and the references. On two CPU cores, DEVICES=2 is faster.
DEVICES ?= auto
ATTACK := $(BIN)/python eval.py concept=violence attacks=all attack.inversion.runs=1 attack.relearning.pictures=[25] \
  attack.relearning_lora.pictures=[25] attacked_prompts=32 sets=[direct,benign] metrics.final_images_per_set=64 \
  trainer.devices=$(DEVICES)
bench-attacks: bench-stages
	$(ATTACK) output=$(TABLE)/attacks models=[$(TABLE)/textual/erased,$(TABLE)/trajectory/erased,$(TABLE)/both/erased]
	$(BIN)/python -m benchmarks.readme $(STAGES) $(addprefix --hardened ,$(wildcard $(HARDENED))) \
	  --attacks $(TABLE)/attacks $(wildcard $(TABLE)/attacks-hardened)

# The same on the hardened model. The references are attacked once for both.
bench-attacks-hardened: bench-table bench-attacks
	$(ATTACK) output=$(TABLE)/attacks-hardened models=[$(HARDENED)/erased]
	$(BIN)/python -m benchmarks.readme $(STAGES) --hardened $(HARDENED) \
	  --attacks $(TABLE)/attacks $(TABLE)/attacks-hardened

# Each stage alone, both, and hardening, on the sibling of each family. About an hour a family on one core.
FAMILIES ?= xl sd3 flux
FAMILY := runs/families
bench-families: setup
	set -e; for f in $(FAMILIES); do \
	  run="concept=violence model=emoji_$$f" out=$(FAMILY)/$$f; \
	  erase="$(BIN)/python train.py $$run metrics.enabled=false" eval="$(BIN)/python eval.py $$run trainer.devices=$(DEVICES)"; \
	  $$erase output=$$out/textual stages=[textual]; \
	  $$erase output=$$out/trajectory stages=[trajectory] optimizer.lr=4e-4 optimizer.schedule=constant \
	    trajectory.preserve_weight=12 trajectory.keep_weight=12; \
	  $$erase output=$$out/both; \
	  $$erase output=$$out/hardened experiment=hardened; \
	  last=$$out/both/erased,$$out/hardened/erased all=$$out/textual/erased,$$out/trajectory/erased,$$last; \
	  $$eval models=[$$all] output=$$out/scores; \
	  $$eval models=[$$all] output=$$out/scenes sets=[mixed,scenes] metrics.final_images_per_set=256; \
	  $$eval models=[$$last] output=$$out/attacks attacks=quick_no_words attacked_prompts=32 sets=[direct,benign] \
	    metrics.final_images_per_set=64; \
	done
	$(BIN)/python -m benchmarks.families $(FAMILY)

bench-leaderboard: setup
	$(BIN)/python -m trce_lightning.leaderboard
	$(BIN)/python -m benchmarks.leaderboard runs/leaderboard --readme

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv dist .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
