# mmedrag: `make demo` and `make test` work on a fresh machine with Python 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
DEV    := train,clip,real,serve,openai,dicom,ocr,dev
# One stamp per state of the requirements: a changed pin installs again, an unchanged one does not.
STATE  := $(shell cat pyproject.toml constraints.txt Makefile | cksum | cut -d' ' -f1)
CORE   := $(VENV)/.installed-$(STATE)
ALL    := $(VENV)/.installed-dev-$(STATE)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help demo test check format docs bench bench-full repro meteor tiny clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 12

demo: $(CORE) ## install, then run the main job on the embedded models; ends in demo/report.html
	$(BIN)/mmedrag demo --out demo

test: $(ALL) ## install with the test extras, then run the default tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(ALL) ## lint, format, types, generated docs current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mmedrag.cli.docs --check docs

format: $(ALL) ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(ALL) ## write the generated pages
	$(BIN)/python -m mmedrag.cli.docs docs

bench: $(ALL) ## measure against naive and released procedures; minutes; writes bench/results
	@for file in bench/*.py; do echo "$$file"; $(BIN)/python $$file || exit 1; done

bench-full: $(ALL) ## retrieval at the largest sizes
	$(BIN)/python bench/retrieval.py --full

repro: $(ALL) ## re-derive published and own numbers; writes docs/reproduce.md
	$(BIN)/mmedrag repro

WORDNET ?= /usr/share/wordnet
meteor: $(CORE) ## lay out WordNet for METEOR, from Debian's wordnet-base (fetched if absent, no root)
	@if [ -f $(WORDNET)/data.noun ]; then $(BIN)/python -m mmedrag.evaluation.metrics.text $(WORDNET); else \
	  dir=$$(mktemp -d) && (cd $$dir && apt-get download -q wordnet-base && dpkg -x *.deb .) && \
	  $(BIN)/python -m mmedrag.evaluation.metrics.text $$dir/usr/share/wordnet && rm -r $$dir; fi

tiny: $(ALL) ## train the embedded models again from seed (three to four hours)
	$(BIN)/python -m training.embedded

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mmedrag needs Python 3.11 or later; say which: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "Python's venv module is missing; on Debian: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(CORE): | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@rm -f $(VENV)/.installed-[0-9]* && touch $@

$(ALL): | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$(DEV)]'
	@rm -f $(VENV)/.installed-* && touch $@ $(CORE)
