# make reproduce   train the five assignments at demonstration scale and print the paper's table beside them;
#                  OPTIONS are passed on: make reproduce OPTIONS="optim=paper logger.mode=offline"; with OPTIONS=--accept the table
#                  becomes the committed one, in results/ and in the pages that show it
# make test        lint, then every test, in two processes
# Both create .venv and install requirements.lock into it when that has not been done yet. A .pth file there names this checkout, so
# that its Python finds the packages from anywhere.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed.lock

.PHONY: reproduce test lint lock

reproduce: $(STAMP)
	$(BIN)/python scripts/reproduce.py scale=demo $(OPTIONS)

test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The stamp is a copy of the lock that was installed: a changed lock is installed, an unchanged one is not looked at again.
$(STAMP): requirements.lock Makefile
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
	  { echo "Python 3.10 to 3.13 is needed; name one with: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	pwd > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/manifold_gpt.pth"
	cp requirements.lock $(STAMP)

# Universal for all supported versions; torch's own CUDA packages are left to torch, so that a CPU build stays one.
lock:
	uv pip compile --universal --python-version 3.10 --no-header --no-annotate requirements.txt \
	  | sed -E '/^(nvidia|cuda|triton)/d; s/^torch==.*/torch==2.13.0/' | uniq > requirements.lock.new
	(echo '# Exact versions for Python 3.10 to 3.13, written by `make lock`. What torch itself needs on CUDA, torch pins.'; \
	  cat requirements.lock.new) > requirements.lock
	rm requirements.lock.new
