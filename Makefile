# make serve and make test need nothing but Python 3.11, make and gcc: each does its own set-up.

PYTHON ?= python3.11
EXTRAS := models,openvino,test,dev
ifeq ($(shell uname -sm),Linux x86_64)
MAIN_EXTRAS := ipex,$(EXTRAS)
else
MAIN_EXTRAS := $(EXTRAS)
endif
CONFIG ?= serve_config.yaml
PYTEST_ARGS ?=

.PHONY: install install-latest serve test test-latest check format bench clean

install: .venv/.installed
install-latest: .venv-latest/.installed

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

serve: .venv/.installed
	.venv/bin/python -m deployments.check $(CONFIG)
	.venv/bin/serve run $(CONFIG)

test: .venv/.installed
	.venv/bin/python -m pytest $(PYTEST_ARGS)

test-latest: .venv-latest/.installed
	.venv-latest/bin/python -m pytest $(PYTEST_ARGS)

check: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/.installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# Prints the README's tables of figures, measured here.
bench: .venv/.installed
	.venv/bin/python -m benchmarks.engines --threads 2
	.venv/bin/python -m benchmarks.engines --threads 1
	.venv/bin/python -m benchmarks.serving

clean:
	rm -rf .venv .venv-latest build *.egg-info
