# The commands of this project. Every one may be repeated and interrupted; `make help` lists them.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
# Passed to pip, e.g. PIP_ARGS="--find-links wheels" for a CPU build of torch that lies in the folder wheels.
PIP_ARGS ?=
# Passed to `qlib bench`.
ARGS ?=
QLIB = $(VENV)/bin/python -m qlib
# What the environment was installed from. It is compared by content: a fresh checkout changes all times.
SOURCES = requirements.lock pyproject.toml
STAMP = $(VENV)/.installed

.PHONY: help env report report-full tools test smoke bench clean
.NOTPARALLEL:

help: ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | while IFS='|' read -r name text; do \
	  printf '%-18s %s\n' "$$name" "$$text"; done

env: ## make the environment in .venv from requirements.lock, if it is missing or the lock changed
	@cat $(SOURCES) | cmp -s - $(STAMP) || { \
	  set -e; rm -f $(STAMP); \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	    { echo "Python 3.11 is needed; name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }; \
	  $(PYTHON) -m venv $(VENV) || { echo "on Debian: apt install python3-venv" >&2; exit 2; }; \
	  $(VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) -r requirements.lock; \
	  $(VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) --no-deps -e .; \
	  cat $(SOURCES) > $(STAMP).new; mv $(STAMP).new $(STAMP); }

# Runs a tier and renders what there is, also if a strategy failed; the exit code is then that of the run.
# Bad input (2) and an interruption (130) end it at once.
define run_and_report
code=0; $(QLIB) run --tier $(1) $(2) || code=$$?; \
case $$code in 0|1) ;; *) exit $$code;; esac; \
$(QLIB) report $(2) $(3) || exit $$?
endef

report: env ## run the core strategies and lessons that are out of date and render reports/index.html
	@$(call run_and_report,core); exit $$code

report-full: env ## run all strategies, render, and refresh reports/published/
	@$(call run_and_report,full); $(QLIB) publish || exit $$?; exit $$code

# A tool that cannot be installed fails its strategies with its own words; the exit code is then 1.
tools: env ## install all outside tools, run their strategies, render, and say what was measured
	@code=0; $(QLIB) tools install --all || code=$$?; \
	$(QLIB) run $(wildcard params/tool-*.yaml) || code=$$?; \
	$(QLIB) report || code=$$?; \
	$(QLIB) tools list; exit $$code

test: env ## run the tests
	@$(VENV)/bin/python -m pytest

smoke: env ## run the smallest strategies into reports/smoke/, in a few minutes
	@$(call run_and_report,smoke,--runs reports/smoke/runs,--output reports/smoke/index.html); exit $$code

bench: env ## measure speed and quality side by side with outside tools, alone on the machine; ARGS="--only gptq"
	@$(QLIB) bench $(ARGS)

clean: ## remove runs and rendered pages, but not the environment and reports/published/
	rm -rf reports/runs reports/smoke reports/notebooks reports/index.html
