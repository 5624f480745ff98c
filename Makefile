# `make help` lists the tasks. Each is one command, to be run in an environment that has the extra `dev`.
.DEFAULT_GOAL := help
.PHONY: help install format check test slow docs tables notebook job ci clean

help:  ## List the tasks
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install:  ## Install the package and all tools into the current environment
	python -m pip install -e ".[dev]"

format:  ## Format the code and fix what ruff can fix
	ruff check --fix . ; ruff format .

check:  ## Check style and types
	ruff check . && ruff format --check . && mypy

test:  ## Run the fast tests
	pytest -n 2 --dist worksteal

slow:  ## Run the slow tests
	pytest -n 2 --dist worksteal -m slow

docs:  ## Build the site into docs/site
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict -f docs/mkdocs.yml

tables:  ## Put the committed results into README.md
	python docs/quoted.py

notebook:  ## Execute docs/notebook.py into docs/notebook.ipynb
	jupytext --to ipynb --execute docs/notebook.py

job:  ## Run the main job on scikit-learn's digits into runs/digits
	python -m experiments --dataset digits --out runs/digits

ci:  ## Run everything that a change must pass, in an environment of its own
	.ci/run

clean:  ## Delete the built site, distributions and caches
	rm -rf docs/site dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
