# make serve and make test need nothing but Python 3.11, make and gcc: each does its own set-up.

PYTHON ?= python3.11
EXTRAS := models,openvino,onnxruntime,test,dev
ifeq ($(shell uname -sm),Linux x86_64)
MAIN_EXTRAS := ipex,$(EXTRAS)
else
MAIN_EXTRAS := $(EXTRAS)
endif
CONFIG ?= serve_config.yaml
PYTEST_ARGS ?=
# Two tests at a time, where they share no server; after another `-n 0` in PYTEST_ARGS it is one, as pdb needs it.
BOTH_CORES := --numprocesses 2 --dist worksteal

.PHONY: install install-latest install-clients serve test test-latest test-clients check format bench bench-engines bench-serving bench-latency bench-hop bench-binary bench-start bench-changes bench-behind bench-generate ahead clean

install: .venv/.installed
install-latest: .venv-latest/.installed
install-clients: .venv-clients/.installed

# torch 2.8 with IPEX, the main environment.
.venv/.installed: pyproject.toml constraints/main.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints/main.txt --editable '.[$(MAIN_EXTRAS)]'
	touch $@

# The newest torch that is tested, without IPEX.
.venv-latest/.installed: pyproject.toml constraints/latest.txt
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints/latest.txt --editable '.[$(EXTRAS)]'
	touch $@

# Clients of the protocols that do not go with the main environment: openai 1.0.0, and schemathesis.
.venv-clients/.installed: constraints/clients.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints/clients.txt openai schemathesis
	touch $@

serve: .venv/.installed
	.venv/bin/python -m deployments.run $(CONFIG)

# Compile into the cache without serving.
ahead: .venv/.installed
	.venv/bin/python -m deployments.ahead $(ANEW) $(CONFIG)

# optim's tests in a process of their own, which never sees Ray: as its users run it.
test: .venv/.installed
	.venv/bin/python -m pytest $(BOTH_CORES) tests/optim $(PYTEST_ARGS)
	.venv/bin/python -m pytest $(BOTH_CORES) tests/deployments $(PYTEST_ARGS)
	.venv/bin/python -m pytest tests/e2e $(PYTEST_ARGS)

# Without what is the same with every torch: how processes, locks and files behave, Ray Serve's roll-outs, the clients.
test-latest: .venv-latest/.installed
	.venv-latest/bin/python -m pytest -m "not any_torch" $(BOTH_CORES) tests/optim $(PYTEST_ARGS)
	.venv-latest/bin/python -m pytest -m "not any_torch" $(BOTH_CORES) tests/deployments $(PYTEST_ARGS)
	.venv-latest/bin/python -m pytest -m "not any_torch" tests/e2e/test_shipped.py $(PYTEST_ARGS)

test-clients: .venv/.installed .venv-clients/.installed
	.venv/bin/python -m pytest tests/deployments/test_old_clients.py $(PYTEST_ARGS)

check: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/.installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# Print the README's tables of figures, measured here; about 80 minutes.
bench: bench-engines bench-serving bench-latency bench-hop bench-binary bench-start bench-changes bench-behind bench-generate

bench-engines: .venv/.bench-installed
	.venv/bin/python -W ignore -m benchmarks.engines --threads 2 --plot benchmarks/engines.png
	.venv/bin/python -W ignore -m benchmarks.engines --threads 1 --models efficientnet-lite0

bench-serving: .venv/.bench-installed
	.venv/bin/python -W ignore -m benchmarks.serving --plot benchmarks/serving.png

bench-latency: .venv/.bench-installed
	.venv/bin/python -W ignore -m benchmarks.latency

bench-hop: .venv/.bench-installed
	.venv/bin/python -W ignore -m benchmarks.hop

bench-binary: .venv/.bench-installed
	.venv/bin/python -W ignore -m benchmarks.binary --rounds 11

bench-start: .venv/.bench-installed
	.venv/bin/python -W ignore -m benchmarks.start --plot benchmarks/start.png

bench-changes: .venv/.bench-installed
	.venv/bin/python -W ignore -m benchmarks.changes

bench-behind: .venv/.bench-installed
	.venv/bin/python -W ignore -m benchmarks.behind

bench-generate: .venv/.bench-installed
	.venv/bin/python -W ignore -m benchmarks.generate
	.venv/bin/python -W ignore -m benchmarks.streams

# What benchmarks alone need.
.venv/.bench-installed: .venv/.installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints/main.txt --editable '.[bench]'
	touch $@

clean:
	rm -rf .venv .venv-latest .venv-clients build *.egg-info
