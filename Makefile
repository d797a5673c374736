# Everything that is done with this tree, by name. `make` alone lists it.

SHELL := /bin/sh
# Where rustup puts cargo, for shells that have not read its environment.
export PATH := $(PATH):$(HOME)/.cargo/bin
CARGO := cargo
# A CI run builds exactly what Cargo.lock says.
LOCKED := $(if $(CI),--locked)
TARGET_DIR = $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),target)
# Simulated runs of `make sim`, and where they begin.
SEEDS := 20000
START := 1
# Rows of `make model`: members, writes, crashes, cuts, losses of power, epoch, view, takeover.
ROWS := 2,1,1,1,0,3,6,1 2,1,2,1,0,2,5,1 2,2,1,1,0,2,5,1 2,1,1,1,1,2,5,1 3,1,1,1,0,2,5,1 3,1,1,0,1,2,5,1 3,1,0,1,1,2,5,1
# Runs of `make test-verbs`, and whether of all scenarios: ALL=1.
TIMES := 1
ALL :=

.DEFAULT_GOAL := help
.PHONY: help demo test test-verbs bench bench-resync lint fmt docs audit sim sim-mutants model deps clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | while IFS='	' read -r name text; do \
		printf '  make %-12s %s\n' "$$name" "$$text"; done

demo: ## two nodes, a pool, real I/O; a node is killed and comes back: the main job in a minute, every claim checked
	@./cloud-hypervisor-tests/install-deps.sh build
	$(CARGO) build $(LOCKED) --release --bin rmr-node --bin rmrctl --bin vhost-brmr --bin demo
	@$(TARGET_DIR)/release/demo

test: deps ## all tests: units, documentation, whole systems with guests in QEMU
	$(CARGO) build $(LOCKED) --workspace --bins
	$(CARGO) test $(LOCKED) --workspace --doc --quiet
	@if $(CARGO) nextest --version >/dev/null 2>&1; \
	then set -- nextest run; else set -- test; fi; set -x; $(CARGO) "$$@" $(LOCKED) --workspace --all-targets --no-fail-fast

test-verbs: deps ## the whole system over Soft-RoCE in one guest: the scenarios of the CI, or all with ALL=1, TIMES=1 times; a line for each, and what failed
	$(CARGO) build $(LOCKED) --workspace --bins
	RMR_TIMES=$(TIMES) RMR_ALL=$(ALL) $(CARGO) test $(LOCKED) -p cloud-hypervisor-tests --test verbs -- --nocapture

bench: deps ## side by side with what a user would pick instead (docs/benchmarks.md); about 6 minutes
	$(CARGO) build $(LOCKED) --release --workspace --bins
	$(TARGET_DIR)/release/bench-compare

bench-resync: deps ## what a resync moves and takes, and what the guest notices of it (docs/benchmarks.md); about 10 minutes
	$(CARGO) build $(LOCKED) --release --workspace --bins
	$(TARGET_DIR)/release/bench-resync

lint: ## format and clippy, no warning allowed
	$(CARGO) fmt --all --check
	$(CARGO) clippy $(LOCKED) --workspace --all-targets -- -D warnings
	$(CARGO) clippy $(LOCKED) -p rmr-common --all-targets --features mutants -- -D warnings

fmt: ## formats the code
	$(CARGO) fmt --all

docs: ## the API documentation, no warning allowed
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc $(LOCKED) --workspace --no-deps --document-private-items

audit: ## licences, sources and known vulnerabilities of the dependencies
	@./.ci/audit

sim: ## simulated pools with faults: SEEDS=20000 runs from seed START=1 (docs/simulator.md)
	RMR_SIM_SEEDS=$(SEEDS) RMR_SIM_START=$(START) \
		$(CARGO) test $(LOCKED) --release -p rmr-common --test simulation -- --nocapture

sim-mutants: ## makes deliberate mistakes in the protocol, each of which the simulator or a unit test must find; prints what found which (docs/simulator.md)
	$(CARGO) test $(LOCKED) --release -p rmr-common --features mutants --test mutants
	@./.ci/unit-mutants

model: ## the model checker further than in the tests: ROWS, for 15 minutes at most (docs/model.md); some GiB of memory
	$(CARGO) test $(LOCKED) --release -p rmr-common --test model --no-run
	RMR_MODEL="$(ROWS)" timeout 15m \
		$(CARGO) test $(LOCKED) --release -p rmr-common --test model what_the -- --ignored --nocapture

deps: ## installs what Debian 12 lacks for tests and benchmarks; does nothing twice
	@./cloud-hypervisor-tests/install-deps.sh

clean: ## removes everything that was built
	$(CARGO) clean
