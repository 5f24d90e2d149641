# make test, make demo: set up .venv by themselves. PYTHON chooses the interpreter.
PYTHON ?= python3
PYTEST_FLAGS ?=
BENCH_FLAGS ?=
# The name that results are kept under.
RESULTS ?= cpu
# One thread: for 8x8 images a second gains little, and costs much where other work runs.
DEMO_FLAGS ?= --compare --plot demo.png --threads 1

# Modules are run with -m: console scripts break where the path has a space or is long.
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# Packages are compiled when first imported; pip would compile all of them, for a minute.
unexport PYTHONDONTWRITEBYTECODE
CLANG_FORMAT = find csrc tests -name '*.h' -o -name '*.inc' -o -name '*.cpp' -o -name '*.cu' | xargs \
	$(PY) -c 'import clang_format, sys; sys.exit(clang_format.clang_format())'
CSRC := $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: test demo lint format bench results report sanitize clean
.PHONY: gpu gpu-built gpu-tests gpu-timeline gpu-host gpu-bench
.NOTPARALLEL:

# One thread a worker: two workers with two threads each fight over two cores.
test: .venv/test .venv/extension
	jobs=$$(getconf _NPROCESSORS_ONLN); [ $$jobs -le 8 ] || jobs=8; \
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $$jobs --dist worksteal $(PYTEST_FLAGS)

demo: .venv/demo .venv/extension
	$(PY) examples/train.py $(DEMO_FLAGS)

lint: .venv/test
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -c 'import vermin; vermin.main()' -q -t=3.10- --violations memdense tests benchmarks examples
	$(CLANG_FORMAT) --dry-run -Werror

format: .venv/test
	$(PY) -m ruff check --fix-only
	$(PY) -m ruff format
	$(CLANG_FORMAT) -i

bench: .venv/test .venv/extension
	$(PY) -m pytest benchmarks --benchmark-only $(BENCH_FLAGS)

# Measures again what README.md and docs/ show, and writes it there. For a quiet machine.
results: .venv/test .venv/extension
	$(PY) -m pytest benchmarks --benchmark-only --compile densenet121 \
		--benchmark-json=benchmarks/results/$(RESULTS).json $(BENCH_FLAGS)
	$(MAKE) report

report: .venv/test
	$(PY) benchmarks/report.py benchmarks/results/$(RESULTS).json --out docs/$(RESULTS) \
		--into README.md docs/roofline.md

# On a GPU machine, with the torch of its own python3: no venv, no network. `make gpu` ends at what
# fails, `make -k gpu` does the rest too, and each part can be made alone. The tests compile hundreds
# of kernels, a second each: in as many processes as there may be. Then what matters most, in
# minutes: without GPU_FLAGS it is all, in an hour.
GPU_FLAGS ?= --arch densenet121 --seconds 5 -k "test_step or test_primitive or test_dilated"
gpu: gpu-tests gpu-timeline gpu-host gpu-bench

gpu-built:
	@$(PYTHON) -c 'import importlib.util, sys; \
		importlib.util.find_spec("torch") or sys.exit("make gpu: $(PYTHON) has no torch; set PYTHON="); \
		import torch; \
		torch.cuda.is_available() or sys.exit("make gpu: no CUDA device here; nothing was run")'
	MEMDENSE_BUILD=require $(PYTHON) setup.py -q build_ext --inplace

gpu-tests: gpu-built
	workers=$$($(PYTHON) -c 'import os, xdist; print("-n", min(12, os.cpu_count()))' 2>/dev/null); \
	OMP_NUM_THREADS=1 PYTHONPATH=. $(PYTHON) -m pytest $$workers -m gpu $(PYTEST_FLAGS)

gpu-timeline: gpu-built
	PYTHONPATH=. $(PYTHON) benchmarks/timeline.py

gpu-host: gpu-built
	PYTHONPATH=. $(PYTHON) benchmarks/host.py

gpu-bench: gpu-built
	PYTHONPATH=. $(PYTHON) -m pytest benchmarks --benchmark-only $(GPU_FLAGS) $(BENCH_FLAGS)

# On a GPU machine, after make gpu; compute-sanitizer comes with the CUDA toolkit.
sanitize:
	for tool in memcheck racecheck synccheck initcheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=. compute-sanitizer --tool $$tool \
			--error-exitcode 1 $(PYTHON) -m pytest -q -m gpu tests/test_cuda_conv3x3.py \
			-k 'test_layer and not 56' || exit 1; \
	done

clean:
	rm -rf .venv build *.egg-info memdense/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("memdense needs Python 3.10 or later, $(PYTHON) is " + sys.version.split()[0] + "; set PYTHON=")'
	$(PYTHON) -m venv .venv

# Dependencies first and in one resolve; the extension needs torch, so it is built after.
.venv/test: EXTRAS := dev,peers,examples
.venv/demo: EXTRAS := examples
.venv/test .venv/demo: pyproject.toml constraints.txt | $(PY)
	$(PIP) install -q --no-compile -c constraints.txt setuptools wheel ninja
	MEMDENSE_BUILD=0 $(PIP) install --no-compile -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

# In place, where what did not change is not compiled again.
.venv/extension: setup.py pyproject.toml $(CSRC) | $(PY)
	$(PY) setup.py -q build_ext --inplace
	@$(PY) -c 'from memdense import _extension as e; print("memdense extension:", \
		e.reason() or "built", "\nmemdense CUDA kernels:", e.cuda_reason() or "built")'
	@touch $@
