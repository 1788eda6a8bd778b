# Every target makes .venv by itself; make and Python 3.11 or newer with its venv module are enough.

PYTHONS := python3.13 python3.12 python3.11 python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help demo test nightly check lint wheel clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## compress the model that ships with the package, and show the result
	$(BIN)/compress-cluster run tiny --out runs/demo --yes

test: $(INSTALLED)  ## run every test that needs no GPU, in two processes
	$(BIN)/pytest -m "not gpu and not nightly" -n 2 --dist loadfile --no-loadscope-reorder

check: lint  ## lint, then run the fast tests
	$(BIN)/pytest -m "not ray and not gpu and not slow and not nightly"

nightly: $(INSTALLED)  ## run all cases of the tests of which `make test` runs a sample
	$(BIN)/pytest -m nightly

lint: $(INSTALLED)  ## check format, style, types and the import contracts
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

wheel: $(INSTALLED)  ## what cluster.yaml installs on the nodes: this package and its versions, in dist/
	rm -rf dist build
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w dist .
	cp constraints.txt dist/

clean:  ## remove what make and the tools made; runs/ stays
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

$(INSTALLED): pyproject.toml constraints.txt
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  for python in $(PYTHONS); do \
	    $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	    echo "making .venv with $$($$python --version)"; \
	    exec $$python -m venv --clear .venv; \
	  done; \
	  echo "Python 3.11 or newer with its venv module is needed; none of these is: $(PYTHONS)." >&2; \
	  echo "On Debian: apt-get install python3-venv" >&2; \
	  exit 1; }
	@echo "installing into .venv (a few minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
