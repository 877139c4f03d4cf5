# The front door. `make demo` and `make test` install what is missing and need nothing else but the
# Rust toolchain on Debian 12.
SHELL := /bin/sh
.DEFAULT_GOAL := help

TARGET := $(or $(CARGO_TARGET_DIR),target)
GUEST_TRIPLE := x86_64-unknown-linux-gnu
BINARIES := -p towline-client -p towline-control-plane -p towline-node-agent -p towline-node-helper

.PHONY: help setup build release guest kernel demo test test-nested lint docs unit soak sim fuzz bench bench-nested bench-save clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup:
	@tests/setup/packages.sh

guest: ## Build the static guest agent
	RUSTFLAGS="-C target-feature=+crt-static" cargo build --quiet -p towline-guest-agent --profile guest --target $(GUEST_TRIPLE)
	@mkdir -p $(TARGET)/debug $(TARGET)/release
	@for to in debug release; do \
	  cp -f $(TARGET)/$(GUEST_TRIPLE)/guest/towline-guest-agent $(TARGET)/$$to/.guest-agent.tmp && \
	  mv -f $(TARGET)/$$to/.guest-agent.tmp $(TARGET)/$$to/towline-guest-agent-static; done

build: guest ## Build tow, the control plane and the node agent (debug)
	cargo build --quiet $(BINARIES)

release: setup guest ## Build them optimised, into target/release
	cargo build --release $(BINARIES)

kernel: build ## Download the guest kernel ahead of the first start
	$(TARGET)/debug/towline-node-agent prepare

demo: release ## Offload a real build and its tests into a real microVM
	@tests/demo/demo.sh $(TARGET)/release

lint:
	cargo fmt --all --check
	cargo clippy --quiet --workspace --all-targets -- -D warnings

docs: ## Build the API documentation
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" cargo doc --quiet --workspace --no-deps --document-private-items

unit: build kernel
	@tests/setup/tools.sh
	cargo nextest run --workspace --locked
	@tests/setup/count-skipped.sh $(TARGET)/nextest/default/junit.xml

test: ## Install what tests need, lint, build and run every test
	@tests/setup/packages.sh test
	@$(MAKE) --no-print-directory lint docs unit

test-nested: build kernel ## Test with a real Cloud Hypervisor (TOWLINE_CLOUD_HYPERVISOR), nested
	@tests/setup/packages.sh test
	@tests/nested/run.sh $(TARGET)/debug

bench-save: release ## Measure tow save beside tar, zstd, umoci and buildah
	@tests/setup/packages.sh bench
	$(TARGET)/release/towline-node-agent prepare
	cargo run --release -p towline-benches -- --bin-dir $(TARGET)/release --save

bench-nested: release ## Measure with a real Cloud Hypervisor, nested
	@tests/setup/packages.sh bench
	$(TARGET)/release/towline-node-agent prepare
	@tests/nested/run.sh $(TARGET)/release bench

sim: ## Run many seeds of the simulator
	TOWLINE_SIM_SEEDS=$${TOWLINE_SIM_SEEDS:-2000} cargo nextest run --release -p towline-simulator

soak: build kernel ## The long runs: 200 kills, many seeds
	@tests/setup/packages.sh test
	@tests/setup/tools.sh
	TOWLINE_KILLS=200 TOWLINE_SIM_SEEDS=500 cargo nextest run --profile soak --workspace -E 'package(towline-simulator) or test(/kill/)'

fuzz: ## Run each fuzz target for FUZZ_SECONDS (default 600)
	@tests/fuzz/run.sh $${FUZZ_SECONDS:-600}

bench: release ## Measure, beside the peers, into docs/performance.md
	@tests/setup/packages.sh bench
	cargo run --release -p towline-benches -- --bin-dir $(TARGET)/release

clean: ## Remove what was built
	cargo clean
