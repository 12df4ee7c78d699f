# make demo         pretrain and probe a small backbone on real images of a package, no download
# make demo-cifar10 the same on CIFAR-10: DATA=folder that holds it, or it is downloaded
# make test         the tests, JOBS=2 at a time; make test-slow: the long ones too
# make check        format, lint, types; make format: repair what can be repaired
# make docs         docs/configuration.md from the declared keys
# make reliability  kills, crashes and damage counted, into docs/results/reliability.md
# make clean        remove output/ and caches
# All but the last build a virtual environment in .venv first; VENV=/path uses or builds another.
VENV ?= .venv
JOBS ?= 2
PYTHON ?= python3
# uv installs much faster than pip; pip serves where uv is not on the PATH
UV := $(shell command -v uv 2>/dev/null)
BIN := $(VENV)/bin
READY := $(VENV)/.synco-ready
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.PHONY: help demo demo-cifar10 test test-slow docs reliability check format clean

help:
	@sed -n '/^VENV/q; s/^# //p' Makefile

$(READY): requirements.txt requirements-dev.txt
ifneq ($(UV),)
	test -x $(BIN)/python || $(UV) venv --quiet --seed --python $(PYTHON) $(VENV)
	$(UV) pip install --quiet --python $(BIN)/python -r requirements-dev.txt
else
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
endif
	touch $(READY)

demo-cifar10: CIFAR = --cfg configs/demo_cifar10.yaml $(if $(DATA),--data-path "$(DATA)",--data-path output/cifar10 --download)
demo-cifar10: demo

demo: $(READY)
	@$(BIN)/python tools/demo.py $(CIFAR); code=$$?; \
	if [ $$code = 75 ]; then echo "(make calls it an error; nothing is lost)"; fi; exit $$code

test: $(READY)
	$(PYTEST)

docs: $(READY)
	$(BIN)/python docs/key_page.py

reliability: $(READY)
	$(BIN)/python tests/reliability/driver.py

test-slow: $(READY)
	$(PYTEST) -m "slow or not slow"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf output .pytest_cache .mypy_cache .ruff_cache
