# make study   train the core study at PRESET, execute its notebooks, write reports/PRESET/index.html
# make study-all   the same with every ablation but the atlas
# make night   the evidence: the headline claims on two data sets, with two objectives, at 1, 3 and 10 times the steps
# make atlas   the map of collapse, up to 60 cells (notebook 11)
# make test    pytest, ruff, mypy           make test-browser   what needs Chromium: the report, and the explorer in JupyterLab
# make test-notebooks   every notebook at smoke             make test-processes   groups of processes, and commands killed and gone on with
# make test-latex   what needs pdfLaTeX: every table compiles
# make test-slow   the four before at once, which share what they train
# make faults  kill -9, full disks, 100 rounds; prints what was lost: nothing
# make lab     JupyterLab on 127.0.0.1, as root too; says how to reach it from elsewhere      make clean-env      forget the environment

PYTHON ?= python3
PRESET ?= quick
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: study study-all night atlas test test-notebooks test-browser test-latex test-processes test-slow faults lab data clean-env

study: $(STAMP) data
	$(BIN)/python -m experiments run --preset $(PRESET)

study-all: $(STAMP) data
	$(BIN)/python -m experiments run all --preset $(PRESET)

night: $(STAMP) data
	$(BIN)/python -m ibq data landscapes
	$(BIN)/python -m experiments run evidence --preset night

atlas: $(STAMP) data
	$(BIN)/python -m experiments run collapse_atlas --preset $(PRESET)

data: $(STAMP)
	$(BIN)/python -m ibq data fashion-mnist

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

test-browser: $(STAMP)
	$(BIN)/python -m pytest -n 0 -m browser

test-latex: $(STAMP)
	$(BIN)/python -m pytest -n 0 -m latex

test-notebooks: $(STAMP)
	$(BIN)/python -m pytest -m notebooks

test-processes: $(STAMP)
	$(BIN)/python -m pytest -m processes

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "notebooks or processes or browser or latex"

faults: $(STAMP)
	$(BIN)/python tests/faults.py --rounds 100

lab: $(STAMP)
	$(BIN)/python -m experiments.cli.lab

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; call make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV) || { echo "error: no virtual environment could be made; on Debian install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[study,test]'
	touch $(STAMP)

clean-env:
	rm -rf $(VENV)
