# The words that people and CI use. Each step is a Python tool that can be run by itself.

PYTHON := python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help venv setup check cover test real sim model demo bench chaos chaos-core docs

help: ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: ## the virtual environment (no work if it is up to date)
	@$(PYTHON) tools/make_venv.py

setup: ## prepare this machine: packages, the newer QEMU, the test guest (root)
	@$(PYTHON) tools/setup_machine.py

check: venv ## everything that needs no QEMU: house rules, lint, types, documents, fast tests
	@$(BIN)/python tools/check.py

cover: venv ## each pure module covered by its own test file alone
	@$(BIN)/python tools/coverage_by_module.py

real: setup venv ## the tests with real QEMUs of both versions (root)
	@$(BIN)/python tools/run_real.py

test: setup venv ## all of it: what CI runs
	@$(BIN)/python tools/check.py
	@$(BIN)/python tools/coverage_by_module.py
	@$(BIN)/python tools/run_real.py

sim: venv ## real agents on a clock, a net and QEMUs that are values: SEED=7 (that one), SEEDS=200 (so many), JSON=1
	@$(BIN)/python -m vmferry.testing.sim $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),100) --first $(or $(FIRST),0) --jobs $(or $(JOBS),1)) $(if $(JSON),--json)

model: venv ## every interleaving of what decides, with faults, and of small mistakes in it (minutes)
	@$(BIN)/vmferry model

demo: setup venv ## two hosts on this machine, and a guest that moves between them
	@$(BIN)/vmferry demo

bench: setup venv ## migrations, our own ends of the stream, mirrors and monitors, each against the raw thing
	@$(BIN)/vmferry bench migrate
	@$(BIN)/vmferry bench stream
	@$(BIN)/vmferry bench disks
	@$(BIN)/vmferry bench monitor
	@$(BIN)/vmferry bench lazy

chaos: setup venv ## every fault in every phase, mode and pair of QEMUs (root; an hour and more)
	@$(BIN)/vmferry chaos

chaos-core: setup venv ## every fault in every phase and mode, on the pairs of QEMUs in turn (root)
	@$(BIN)/vmferry chaos --core

docs: venv ## write the documents that are made from the code
	@$(BIN)/python tools/gen_docs.py
