# `make` or `make help` prints the targets. Nothing is needed but Rust and a C compiler; `make lint` takes cargo-deny
# too, `make test-net` root, iproute2, iptables, dig and curl, and `make test-images` a Docker engine and busybox-static.

CARGO ?= cargo
PROGRAMS := -p servicekeel-sidecar -p servicekeel-router

.DEFAULT_GOAL := help
.PHONY: help demo test test-net test-slow test-slow-router test-slow-runtime soak test-images bench compare lint fmt build-sidecar build-router build-controller clean

help: ## Print this list.
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## Show the main job on this machine: two clusters, DNS, TCP and UDP, a cut and a healing. KEEP=1 leaves it running.
	@$(CARGO) build --locked --profile demo $(PROGRAMS) -p examples
	@$${CARGO_TARGET_DIR:-target}/demo/demo

test: ## Run every test that needs neither root nor Docker, except those that take minutes.
	$(CARGO) build --locked --workspace --bins
	$(CARGO) test --locked --workspace

test-net: ## Run the tests of the built programs, those that need root (network namespaces) included, and test-slow.
	$(CARGO) build --locked $(PROGRAMS)
	$(CARGO) test --locked -p e2e -- --include-ignored
	$(CARGO) test --locked -p servicekeel-router --test shares --test names -- --include-ignored
	@$(MAKE) --no-print-directory test-slow

# Each waits most of its time, so they run at once.
test-slow: ## Run the tests that take more than a minute each: 90 s in all.
	$(CARGO) test --locked --no-run -p servicekeel-router -p servicekeel-runtime
	@$(MAKE) --no-print-directory --jobs 2 --output-sync test-slow-router test-slow-runtime

test-slow-router:
	$(CARGO) test --locked -p servicekeel-router --test run -- --ignored

test-slow-runtime:
	$(CARGO) test --locked -p servicekeel-runtime --lib -- --ignored

# Optimised by one level, a seed takes half of the time; what is not the workspace's is built so already. OPT=0 takes what
# `make test` has built.
OPT ?= 1
soak: ## Run every scenario of the simulation with many seeds: SEEDS=n FROM=seed SECONDS=limit ONLY=name.
	@CARGO_PROFILE_DEV_OPT_LEVEL=$(OPT) $(CARGO) run --locked --quiet -p sim --bin soak -- \
		$(if $(SEEDS),--seeds $(SEEDS)) $(if $(FROM),--from $(FROM)) $(if $(SECONDS),--seconds $(SECONDS)) \
		$(if $(ONLY),--only $(ONLY))

test-images: build-sidecar build-router build-controller ## Run the static programs as images FROM scratch, in containers of the Docker engine that answers.
	$(CARGO) test --locked --profile demo -p e2e --features containers --test containers

bench: ## Measure by criterion: annotations, leases, DNS answers, frames, TLS records, the routers' data path.
	$(CARGO) bench --locked -p benches --benches

compare: ## Measure beside direct loopback and rathole, on an idle machine: speed and memory, as ratios. About five minutes.
	$(CARGO) build --locked --release $(PROGRAMS) -p benches
	@$${CARGO_TARGET_DIR:-target}/release/compare --install-peers --check

lint: ## Check format, clippy, and what the workspace depends on.
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets --features e2e/containers -- -D warnings
	$(CARGO) deny --locked check bans licenses sources

fmt: ## Format the code.
	$(CARGO) fmt --all

build-sidecar: ## Build a static servicekeel-sidecar into bin/.
	@deploy/build-static servicekeel-sidecar

build-router: ## Build a static servicekeel-router into bin/.
	@deploy/build-static servicekeel-router

build-controller: ## Build a static servicekeel-controller into bin/.
	@deploy/build-static servicekeel-controller

clean: ## Remove what was built.
	$(CARGO) clean
	rm -rf bin
