# One command per thing to do. All of them use a virtual environment in .venv, made when it is first needed and
# installed again only when pyproject.toml has changed.
CORES ?= all
GPUS ?= $(shell nvidia-smi --list-gpus 2>/dev/null | wc -l)
PYTHON ?= python3
RUN := . .venv/bin/activate &&

.PHONY: help run dvc test test-faults test-slurm check bench clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' Makefile | expand -t 18

run: .venv/run  ## Run the whole pipeline with Snakemake on all cores (CORES=2 for two)
	$(RUN) snakemake --cores $(CORES) $(if $(filter-out 0,$(GPUS)),--resources gpu=$(GPUS))

dvc: .venv/run  ## Run the whole pipeline with DVC, stage by stage
	$(RUN) dvc repro

check: .venv/dev  ## Formatter, linters and types
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) snakefmt --check Snakefile
	$(RUN) mypy
	$(RUN) snakemake --lint

test: check  ## Everything that has to pass: check and all tests
	$(RUN) pytest -n logical --maxprocesses 4 --dist loadfile

test-slurm: .venv/dev  ## All tests on a real Slurm, started here for them, in minutes (QUICK=1: those of `make test`)
	$(RUN) GRADIEND_TEST_SLURM=$(if $(QUICK),quick,all) pytest tests/cluster/test_slurm.py

test-faults: .venv/dev  ## Kill, damage and starve every stage, hundreds of times (about an hour on two cores)
	$(RUN) GRADIEND_TEST_FAULTS=all pytest tests/faults

bench:  ## Measure gradients against their limits and the reference package (ONLY=collector for one part)
	@$(PYTHON) -m bench.gradients.plan $(ONLY)
	@$(MAKE) --no-print-directory .venv/run $(if $(filter-out reference,$(ONLY)),,bench/.venv-reference/ready)
	$(RUN) python -m bench.gradients $(ONLY)

clean:  ## Delete what the pipeline made (artifacts, logs, reports); DVC's cache stays, so that nothing is computed again
	rm -rf artifacts logs benchmarks dvc_plots report.html .stages .snakemake

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/run: pyproject.toml | .venv/bin/python
	$(RUN) python -m pip install --quiet --editable .
	touch $@

.venv/dev: pyproject.toml | .venv/bin/python
	$(RUN) python -m pip install --quiet --editable ".[dev]"
	touch $@ .venv/run

bench/.venv-reference/ready: bench/reference/requirements.txt
	$(PYTHON) -m venv bench/.venv-reference
	bench/.venv-reference/bin/python -m pip install --quiet --requirement bench/reference/requirements.txt
	touch $@
