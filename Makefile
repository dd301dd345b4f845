# make demo: install, train a small network, test it. make test: install, run the test suite.
# A machine with its own environment: make test PYTHON=python VENV= (nothing is installed then).
PYTHON ?= python3
VENV ?= .venv
BIN := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
# Processes that share the tests, one thread each. make test WORKERS=0 runs them in one.
WORKERS ?= auto
READY := $(if $(VENV),$(VENV)/.ready)

.PHONY: demo test lint clean

demo: $(READY)
	@[ ! -d exps/quickstart ] || echo "the earlier demo in exps/quickstart is replaced"
	rm -rf exps/quickstart
	$(BIN) train.py --config configs/quickstart.toml
	$(BIN) test.py --checkpoint exps/quickstart/best.safetensors
	@echo "open exps/quickstart/test/report.html; pictures beside it: forecast_0000.png, forecast.gif, lead_times.png"

test: $(READY)
	$(BIN) -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN) -m ruff check . && $(BIN) -m ruff format --check .

# Remade when a requirements file changes; a broken installation leaves no .ready.
$(VENV)/.ready: requirements.txt requirements-dev.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv exps .pytest_cache .ruff_cache .hypothesis
