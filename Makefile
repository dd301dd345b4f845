# make demo: install, train a small network, test it. make test: install, run the test suite.
# make demo TORCH=cpu: torch without CUDA, an eighth of the download. It counts when .venv is made.
# A machine with its own environment: make test PYTHON=python VENV= (nothing is installed then).
PYTHON ?= python3
VENV ?= .venv
TORCH ?=
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check
BIN := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
# Processes that share the tests, one thread each. make test WORKERS=0 runs them in one.
WORKERS ?= auto
PYTEST = $(BIN) -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder
READY := $(if $(VENV),$(VENV)/.ready)

.PHONY: demo test test-fast lint clean

demo: $(READY)
	@[ ! -d exps/quickstart ] || echo "exps/quickstart holds a run, which is continued: rename it to begin another"
	$(BIN) train.py --config configs/quickstart.toml --resume auto
	$(BIN) test.py --checkpoint exps/quickstart/best.safetensors
	@echo "open exps/quickstart/test_moving_mnist_5/report.html; pictures beside it: forecast_0000.png, forecast.gif, lead_times.png"

test: $(READY)
	$(PYTEST)

# Without compilers, Triton's interpreter and most real processes.
test-fast: $(READY)
	$(PYTEST) -m "not slow"

lint: $(READY)
	$(BIN) -m ruff check . && $(BIN) -m ruff format --check .

# Remade when a requirements file changes; a broken installation leaves no .ready.
$(VENV)/.ready: requirements.txt requirements-dev.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),cpu)
	@echo "downloading torch's CPU build (about 0.2 GB), then the other packages (about 0.2 GB)"
	$(PIP) --index-url $(CPU_INDEX) torch torchvision
else
	@echo "downloading the packages: about 3 GB on Linux, most of it torch's CUDA libraries; make TORCH=cpu leaves them out"
endif
	$(PIP) -r requirements.txt -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
