# make run | smoke | test: each first installs what requirements.txt names into .venv, if needed.
# PYTHON=python3 make test, or make test PYTHON=python3, takes an environment that is there instead.

# A notebook's MPLBACKEND names a module that .venv doesn't have: importing matplotlib would fail
export MPLBACKEND := agg

ifndef PYTHON
PYTHON := .venv/bin/python
VENV := .venv/ready
# What a cluster's `module load` or ROS puts on PYTHONPATH would count as installed in .venv
unexport PYTHONPATH
endif

help:
	@echo "make run    train on CIFAR-10, 20 epochs (ARGS=\"--epochs 5\" passes settings on)"
	@echo "make smoke  the whole lab in about a minute, on generated images, without a download"
	@echo "make test   check what the lab promises"
	@echo "make clean  remove .venv and caches; data and outputs stay"

run: $(VENV)
	$(PYTHON) lab0.py $(ARGS)

smoke: $(VENV)
	$(PYTHON) lab0.py --smoke $(ARGS)

test: $(VENV)
	$(PYTHON) -m pytest -q test_lab0.py $(ARGS)

.venv/ready: requirements.txt
	@test -x .venv/bin/python || python3 -m venv --clear .venv
	@.venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "lab0 needs Python 3.10 or newer: install it as python3, remove .venv"; exit 1; }
	@.venv/bin/python -c 'import pip' 2>/dev/null || .venv/bin/python -m ensurepip
	@echo "Installing PyTorch and the rest into .venv: some minutes, 5.5 GB"
	PIP_USER=0 .venv/bin/python -m pip install --quiet -r requirements.txt
	@touch $@

clean:
	rm -rf .venv __pycache__ .pytest_cache .ruff_cache

.PHONY: help run smoke test clean
