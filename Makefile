# Everything a newcomer needs: `make run` trains the embedded default, `make test` runs the suite.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
CPU := JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=2

.PHONY: run test lint format lock parity golden run-smollm2 clean

run: .venv/run
	$(CPU) $(BIN)/python -m oapl_jax.train --config=configs/arithmetic.py --workdir=runs/arithmetic \
	  --install_seconds=$$(cat .venv/run)

test: .venv/dev
	$(CPU) $(BIN)/python -m pytest tests

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A stamp file holds the seconds that its install took.
.venv/run: requirements/run.lock setup.py
	@echo "installing into .venv"
	@start=$$(date +%s); \
	$(PYTHON) -m venv .venv && \
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/run.lock && \
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . && \
	echo $$(( $$(date +%s) - start )) > $@

.venv/dev: .venv/run requirements/dev.lock
	@echo "installing the development tools into .venv"
	@start=$$(date +%s); \
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/dev.lock && \
	echo $$(( $$(date +%s) - start )) > $@

# New versions for the lock files, from setup.py.
COMPILE := $(BIN)/pip-compile --quiet --strip-extras --allow-unsafe --no-emit-index-url \
  --no-emit-find-links --no-emit-trusted-host --no-emit-options --no-header --no-annotate
lock: .venv/dev
	$(COMPILE) --upgrade --output-file=requirements/run.lock setup.py
	$(COMPILE) --upgrade --extra=dev --constraint=requirements/run.lock --output-file=requirements/dev.lock setup.py

clean:
	rm -rf .venv .venv-parity *.egg-info
