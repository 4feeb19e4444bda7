# SPDX-License-Identifier: Apache-2.0
#
# Everything runs in .venv, which is made when first needed. Stamp files in it remember what is
# installed, so a second call starts at once; a change of pyproject.toml installs again.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-lab test-lab-full spec-tools lab-tools \
        lab-kernel-tools lint bench fuzz docs clean

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

help:
	@echo "make demo           kill processes in the middle of DMA, and see what becomes of the memory"
	echo "make test           run the tests, those in guests of Debian's kernel included"
	echo "make test-lab       only those in guests"
	echo "make test-lab-full  those in guests of the second kernel, which is built if need be"
	echo "make lint           check style and types"
	echo "make bench          measure throughput and latency"
	echo "make docs           build the documentation into docs/_build"
	echo "make clean          remove everything that make made (holdfast lab clean: the lab's cache)"

demo: .venv/.installed
	@$(BIN)/holdfast demo

# Tests that measure the whole machine (marker "alone") cannot share it with others. Exit code 5
# of pytest means that there are none of them. Tests that boot guests (marker "lab") load the whole
# machine for minutes; they come last, by themselves.
test: .venv/.installed-test spec-tools
	@$(BIN)/pytest -q -n 2 -m "not alone and not lab"
	$(BIN)/pytest -q -m alone || [ $$? -eq 5 ]
	$(MAKE) --no-print-directory test-lab

# A guest runs on one thread, and its time is counted in instructions: two do not disturb each other.
test-lab: .venv/.installed-test lab-tools
	@$(BIN)/pytest -q -n 2 --dist loadgroup -m "lab and not full_kernel" tests/vm

test-lab-full: .venv/.installed-test lab-tools lab-kernel-tools
	@$(BIN)/holdfast lab kernel
	$(BIN)/pytest -q -n 2 --dist loadgroup -m "lab and full_kernel" tests/vm

# The specification is checked against a second model, with SPIN, which writes C. Without it (and
# without root to install it) those tests skip, and say so.
spec-tools:
	@missing=
	command -v spin >/dev/null || missing=spin
	echo '#include <stdio.h>' | gcc -E - >/dev/null 2>&1 || missing="$$missing gcc libc6-dev"
	if [ "$$missing" ] && [ "$$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
	    echo "Installing" $$missing
	    export DEBIAN_FRONTEND=noninteractive
	    { apt-get update -qq && apt-get install -qq -y $$missing; } >/dev/null 2>&1 ||
	        echo $$missing "cannot be installed" >&2
	fi

# Guests are made of Debian packages by mmdebstrap. Without it (and without root to install it) the
# tests that need a guest skip, and say so.
lab-tools:
	@if [ "$$(id -u)" -eq 0 ] && command -v apt-get >/dev/null && ! command -v mmdebstrap >/dev/null; then
	    echo "Installing mmdebstrap"
	    export DEBIAN_FRONTEND=noninteractive
	    { apt-get update -qq && apt-get install -qq -y mmdebstrap debian-archive-keyring; } \
	        >/dev/null 2>&1 || echo "mmdebstrap cannot be installed" >&2
	fi

lab-kernel-tools: .venv/.installed
	@missing=$$($(BIN)/python -c 'from holdfast.lab import kernel; print(*kernel.missing_packages())')
	if [ -n "$$missing" ] && [ "$$(id -u)" -eq 0 ] && command -v apt-get >/dev/null &&
	        ! $(BIN)/holdfast lab kernel --cached >/dev/null 2>&1; then
	    echo "Installing $$missing"
	    export DEBIAN_FRONTEND=noninteractive
	    { apt-get update -qq && apt-get install -qq -y $$missing; } >/dev/null 2>&1 ||
	        echo "$$missing cannot be installed" >&2
	fi

lint: .venv/.installed-test
	@$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/.installed
	@$(BIN)/holdfast bench

fuzz: .venv/.installed-test
	@$(BIN)/python tests/fuzz/run.py $(if $(SEED),--seed $(SEED)) $(if $(FRAMES),--frames $(FRAMES))

docs: .venv/.installed-docs
	@$(BIN)/sphinx-build -W -q docs docs/_build
	echo "docs/_build/index.html"

clean:
	@rm -rf .venv build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests examples docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

.venv/.installed: pyproject.toml | .venv/.made
	@echo "Installing Holdfast into .venv"
	$(PIP) -e .
	touch $@

.venv/.installed-%: pyproject.toml | .venv/.made
	@echo "Installing Holdfast into .venv, with what '$*' needs"
	$(PIP) -e '.[$*]'
	touch $@ .venv/.installed

# Debian and Ubuntu ship "venv" without its "ensurepip" half unless python3-venv is installed.
.venv/.made:
	@python=
	for name in python3 python3.14 python3.13 python3.12 python3.11; do
	    if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
	        python=$$name
	        break
	    fi
	done
	if [ -z "$$python" ]; then
	    echo "Holdfast needs Python 3.11 or later, and none is on the PATH." >&2
	    exit 1
	fi
	if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then
	    package=$$("$$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
	    if [ "$$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
	        echo "$$python cannot make virtual environments. Install them first, for example:" >&2
	        echo "    sudo apt-get install $$package" >&2
	        exit 1
	    fi
	    echo "Installing $$package"
	    export DEBIAN_FRONTEND=noninteractive
	    apt-get install -qq -y "$$package" >/dev/null 2>&1 ||
	        { apt-get update -qq && apt-get install -qq -y "$$package" >/dev/null; }
	fi
	echo "Making .venv with $$("$$python" --version)"
	rm -rf .venv
	"$$python" -m venv .venv
	touch $@
