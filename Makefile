# make run | smoke | test: each sets up .venv first, once per requirements.txt.
# PYTHON=python3 make test, or make test PYTHON=python3, takes an environment that is there instead.

ifndef PYTHON
PYTHON := .venv/bin/python
VENV := .venv/ready
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
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "lab0 needs Python 3.10 or newer as python3"; exit 1; }
	@python3 -c 'import ensurepip' 2>/dev/null \
		|| { echo "This Python has no venv. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing PyTorch and the rest into .venv: some minutes, 5.5 GB"
	python3 -m venv --clear .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	@touch $@

clean:
	rm -rf .venv __pycache__ .pytest_cache .ruff_cache

.PHONY: help run smoke test clean
