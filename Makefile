# Every target sets itself up on a machine that has only python3 (3.11 or later) and pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo docs test lint unit table tune mesh processes aot interpreted newest clean

demo: $(VENV)/installed  ## The REPA table at a quick setting: three rows, three seeds, real images.
	$(BIN)/repalign reproduce repa --jobs 2 --workdir workdirs/demo --rows baseline,repa,random_teacher \
	  --config.total_steps=800 --config.evaluation.every=200 --config.checkpoint_every=400

table: $(VENV)/installed  ## The whole REPA table.
	$(BIN)/repalign reproduce repa --jobs 2 --workdir workdirs/repa

tune: $(VENV)/installed  ## The learning-rate search of the REPA table: the same grid and seed for every row.
	mkdir -p workdirs/tune
	for row in baseline repa random_teacher shuffled_teacher constant_teacher efficientnet_teacher; do \
	  for rate in 4e-3 8e-3 1.6e-2; do echo $$row $$rate; done; done | \
	xargs -P 2 -L 1 sh -c '$(BIN)/repalign train --config repa:$$0 --format json \
	  --workdir workdirs/tune/$$0-$$1 --cache workdirs/tune/cache --config.seed=100 \
	  --config.optimizer.learning_rate=$$1 --config.total_steps=1200 --config.evaluation.every=600 \
	  --config.checkpoint_every=0 > workdirs/tune/$$0-$$1.json'

docs: $(VENV)/installed-test  ## The page of all losses, from their docstrings.
	$(BIN)/repalign list losses --costs docs/losses/cost.json > docs/losses/README.md
	$(BIN)/repalign list losses --peers docs/losses/peers.json > docs/losses/peers.md

test: lint unit

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_house_rules.py

unit: $(VENV)/installed-test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=15

mesh: $(VENV)/installed-test  ## The sharded tests on eight simulated devices.
	$(BIN)/python -m pytest -q -k "sharded or mesh"

processes: $(VENV)/installed-test  ## Four real processes, one of them killed, two that continue.
	$(BIN)/python -m pytest -q -m processes

aot: ## Kernels and a train step compiled for TPUs that are not here, in an environment of its own.
	./.ci/aot

interpreted: ## The GPU kernels, interpreted: jax 0.12 only, so on the newest Python found.
	NPROC=64 TESTS="tests/kernels/test_codebook_pallas.py tests/kernels/test_contrastive_pallas.py \
	  tests/kernels/test_neighbor_pallas.py tests/kernels/test_attention_pallas.py" ./.ci/newest

newest: ## The quick tests on the newest Python found, in an environment of its own.
	./.ci/newest

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/installed: $(VENV)/bin/python setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/bin/python setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .[test]
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build *.egg-info workdirs
