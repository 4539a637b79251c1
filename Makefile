# Two commands do everything on a fresh machine with Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
# Compiled modules halve the start of every worker process, and there are hundreds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install lock demo test test-ray test-long test-others lint format docs clean

help:
	@echo "make demo    install, generate phantoms, run the quickstart study, say where its report is"
	@echo "make test    install, lint, type-check, check import layers, run all tests but long ones"
	@echo "make test-long    run the tests that take minutes: a node that is killed, one that is added"

install: .venv/installed

# The versions that the tests ran with, of whatever this platform and Python need of them.
.venv/installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile \
		--constraint requirements.lock --editable '.[dev]'
	touch $@

# Write down what is installed now, after an upgrade that passes `make test`.
lock:
	$(BIN)/pip freeze --exclude-editable > requirements.lock

demo: install
	$(BIN)/amlp-ray data phantoms $(DEMO)/images --kind ultrasound --count 240
	$(BIN)/amlp-ray data prepare $(DEMO)/images $(DEMO)/phantoms --layout paired --size 96 --group-by image
	$(BIN)/amlp-ray study run studies/quickstart.yaml --data $(DEMO)/phantoms --runs $(DEMO)

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Tests of Ray run one by one: two sessions on two CPUs starve leases and start-ups. The others run beside them on what
# processor time is left, and print when they are done.
test: lint
	@$(MAKE) --no-print-directory -j 2 test-ray test-others

test-ray: install
	$(BIN)/pytest -m "ray and not long"

# What would not fit into the time of `make test`.
test-long: install
	$(BIN)/pytest -m long

test-others: install
	@nice -n 19 $(BIN)/pytest -m "not ray and not long" > .venv/test-others.log 2>&1; code=$$?; cat .venv/test-others.log; exit $$code

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: install
	$(BIN)/amlp-ray settings pretrain variants study segment prepare predict --markdown > docs/settings.md
	$(BIN)/python docs/api.py > docs/api.md

clean:
	rm -rf .venv runs build *.egg-info
