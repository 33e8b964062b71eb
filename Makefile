# Tunesmith: `make` lists the targets. Each step prints its name and its elapsed time; its output is in out/logs/.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
.PHONY: help benchmark-autoscaling benchmark-base-model benchmark-density benchmark-encoding benchmark-flood benchmark-gateway benchmark-operator benchmark-publishing benchmark-registration benchmark-routing benchmark-training verify-fuzz-adapters verify-fuzz-gateway verify-fuzz-manifests verify-attacks verify-architectures verify-data verify-methods verify-resume demo test check generate images cluster-up cluster-down clean \
  environment environment-trainer environment-server model check-format check-types check-imports check-generated check-unit

UV_VERSION := 0.13.9
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/tunesmith
export UV := $(CACHE)/uv-$(UV_VERSION)/uv
# Large imports (torch, vLLM, kubernetes) start several times as fast from bytecode.
unexport PYTHONDONTWRITEBYTECODE
STEP := .ci/step
RUN := $(UV) run --frozen --no-sync
CLUSTER := $(RUN) python -m e2e.cluster
GENERATE_CRDS := python -m tunesmith.api.crd --output crds --output charts/tunesmith/files/crds --schemas crds/schemas \
  --reference docs/reference/api.md --stores docs/reference/stores.md
comma := ,
UNIT_TESTS := tests/api tests/storage tests/finetune tests/serving tests/autoscale tests/gateway tests/cli tests/settings

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: environment environment-trainer model ## Train and serve an adapter on a local cluster (KUBECONTEXT=name: on that cluster)
	@$(MAKE) cluster-up images
	@$(RUN) python -m e2e.demo

test: environment environment-clients environment-trainer environment-server model ## Run all tests, the last ones on a real cluster
	@.ci/test

check: environment environment-clients environment-trainer environment-server ## Format, lint, types, import contracts, generated files, unit tests
	@$(MAKE) --jobs=2 check-format check-types check-unit check-imports check-generated

verify-resume: environment-trainer ## Kill training 20 times with SIGKILL and SIGTERM each, and compare with an undisturbed run
	@$(STEP) --last ' (passed|failed).* in ' "resume after kills" env TUNESMITH_RESUME_KILLS=20 \
	  $(UV) run --frozen --no-sync --project trainer-image pytest \
	  tests/trainer/test_resume.py tests/trainer/test_start.py tests/trainer/test_ranks.py

verify-methods: environment-trainer environment-server ## Train, reload, merge and serve every method; writes docs/methods.md
	@$(STEP) --live "methods" $(UV) run --frozen --no-sync --project trainer-image python -m tests.trainer.verify_methods \
	  --engine server-image/engine-cpu/.venv

verify-architectures: environment-trainer environment-server ## Train, reload, merge and serve adapters for every architecture; writes docs/architectures.md; continues an interrupted run
	@$(STEP) --live "architectures" $(UV) run --frozen --no-sync --project trainer-image python -m tests.trainer.verify_architectures \
	  --engine server-image/engine-cpu/.venv --work out/architectures

verify-data: environment-trainer model ## Validate a million rows: check peak memory, and that a second attempt reuses the tokens
	@$(STEP) --last '^(passed|failed)' "a million rows" $(UV) run --frozen --no-sync --project trainer-image \
	  python -m tests.trainer.verify_data --base $(CACHE)/models/SmolLM2-135M-Instruct

verify-fuzz-gateway: environment ## Send 20,000 mutated requests to a gateway and check replies, log and memory (REQUESTS=, SEED=)
	@$(STEP) --last '^(passed|Assert)' "fuzz the gateway" $(RUN) python -m tests.gateway.http_fuzzer \
	  --requests $(or $(REQUESTS),20000) --seed $(or $(SEED),1)

verify-fuzz-adapters: environment-server ## Check 10,000 mutated adapters as an agent does (MUTATIONS=)
	@$(STEP) --last '^(passed|failed)' "fuzz the adapter check" $(RUN) --project server-image python \
	  -m tests.server.fuzz_adapters --mutations $(or $(MUTATIONS),10000)

benchmark-operator: environment ## Measure the operator's work with up to 4,000 adapters in a namespace, and a round of decisions for 5,000; fails above 1 s of CPU
	@$(STEP) --live "operator" $(RUN) python -m benchmarks.operator.benchmark
	@$(STEP) --live "round of decisions" $(RUN) python -m benchmarks.operator.decision_round

benchmark-autoscaling: environment ## Compare the operator's scaling with a fixed pool, an HPA and Dynamo's on a simulated day (SEED=1); fails if it saves too little
	@$(STEP) --live "autoscaling" $(UV) run --frozen --no-sync --with 'matplotlib>=3.10,<4' python -m benchmarks.autoscaling.benchmark \
	  --seed $(or $(SEED),1) --plot out/benchmark-autoscaling.png

benchmark-gateway: environment ## Measure a gateway that reads 10,000 adapters and API keys; fails above 3 s of CPU or a pause of 100 ms
	@$(STEP) --live "gateway" $(RUN) python -m benchmarks.gateway.benchmark

benchmark-flood: environment ## Measure what a flood of one API key does to another one's requests; fails above 1.5 times their p95
	@$(STEP) --live "flood" $(RUN) python -m benchmarks.gateway.flood

benchmark-encoding: environment-trainer model ## Measure the CPU time of encoding chats
	@$(STEP) --live "encoding" $(UV) run --frozen --no-sync --project trainer-image python benchmarks/encoding/benchmark.py \
	  --base $(CACHE)/models/SmolLM2-135M-Instruct

benchmark-density: environment environment-trainer environment-server ## Serve 1,000 adapters from two pods with 8 slots, beside vLLM alone (ADAPTERS=1000); continues an interrupted run
	@$(STEP) "programs of the cluster" $(CLUSTER) build
	@$(STEP) --live "density" $(UV) run --frozen --no-sync --project server-image python -m benchmarks.density.benchmark \
	  --adapters $(or $(ADAPTERS),1000)

benchmark-routing: environment environment-server model ## Compare the gateway's choice of pods with other policies, with two vLLM pods (REPEATS=3 SECONDS=60)
	@$(STEP) "programs of the cluster" $(CLUSTER) build
	@$(STEP) --live "routing" $(UV) run --frozen --no-sync --project server-image python -m benchmarks.routing.benchmark \
	  --repeats $(or $(REPEATS),3) --seconds $(or $(SECONDS),60)

benchmark-publishing: environment environment-trainer environment-server ## Time from a published adapter to its first token on a warm pod, by step (REPEATS=5)
	@$(STEP) "programs of the cluster" $(CLUSTER) build
	@$(STEP) --live "publishing" $(UV) run --frozen --no-sync --project server-image python -m benchmarks.publishing.benchmark \
	  --repeats $(or $(REPEATS),5)

benchmark-registration: environment environment-trainer environment-server ## Processor time of each process for registering an adapter on a pod (ADAPTERS=60)
	@$(STEP) --live "registration" $(UV) run --frozen --no-sync --project server-image python -m benchmarks.density.registration \
	  --adapters $(or $(ADAPTERS),60)

benchmark-base-model: environment environment-server model ## Time until a base model has arrived on a pod, from a store and from a cache, and until its engine serves (MEGABYTES=512 REPEATS=3)
	@$(STEP) "programs of the cluster" $(CLUSTER) build
	@$(STEP) --live "base model" $(UV) run --frozen --no-sync --project server-image python -m benchmarks.base_model.benchmark \
	  --megabytes $(or $(MEGABYTES),512) --repeats $(or $(REPEATS),3) --engine

benchmark-training: environment-trainer model ## Compare the speed of training with other libraries (ROWS=64 REPEATS=3)
	@mkdir -p out
	@$(RUN) --project trainer-image benchmarks/training/benchmark.py --rows $(or $(ROWS),64) --repeats $(or $(REPEATS),3) \
	  --output out/benchmark-training.md

verify-long: environment environment-trainer environment-server model ## After `make demo`: the long tests, which `make test` omits
	@$(STEP) --last ' (passed|failed).* in ' "long tests: trainer" $(RUN) --project trainer-image pytest -m long tests/trainer
	@$(STEP) --last ' (passed|failed).* in ' "long tests: engine" $(RUN) --project server-image pytest -m long tests/server
	@$(STEP) --last ' (passed|failed).* in ' "long tests: scenarios" $(RUN) pytest -m long e2e/scenarios

verify-attacks: environment environment-trainer environment-server ## After `make demo`: run the attacks of e2e/attacks and measure their effect on a victim (ATTACKS=name,name)
	@$(STEP) --live "attacks" $(RUN) pytest --quiet --no-header --tb=short $(if $(ATTACKS),-k "$(subst $(comma), or ,$(ATTACKS))") e2e/attacks

generate: environment environment-server ## Generate the CRDs, the references and the charts' schemas
	@$(STEP) "generate the CRDs" $(RUN) $(GENERATE_CRDS)
	@$(STEP) "generate the values schema of charts/adapters" $(RUN) python charts/values_schema.py
	@$(STEP) "generate flags and values schema of charts/tunesmith" $(RUN) python charts/flags.py
	@$(STEP) "generate the reference of metrics" $(RUN) python docs/metrics.py
	@$(STEP) "generate the reference of errors" $(RUN) python docs/errors.py
	@$(STEP) "copy the default values of charts/tunesmith" $(RUN) python charts/defaults.py
	@$(STEP) "generate the reference of the chart's rights" $(RUN) python charts/rights.py
	@$(STEP) "generate the table of vLLM's architectures" $(RUN) python server-image/engine-cpu/lora_architectures.py

images: environment ## Build the images and import them into the cluster
	@$(STEP) --live "images" $(CLUSTER) images

cluster-up: environment ## Start the local one-node Kubernetes (kubeconfig: .cluster/kubeconfig)
	@$(STEP) --live "local cluster" $(CLUSTER) up

cluster-down: environment ## Stop the local cluster and remove its files
	@$(STEP) "stop the local cluster" $(CLUSTER) down

clean: ## Remove environments, logs and caches of this checkout (after cluster-down)
	@if [ -e .cluster/kubeconfig ]; then $(MAKE) cluster-down; fi
	@rm -rf out .venv trainer-image/.venv server-image/.venv server-image/engine-cpu/.venv benchmarks/training/litgpt/.venv tests/clients/.venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(UV): .ci/fetch-uv
	@$(STEP) "fetch uv $(UV_VERSION)" .ci/fetch-uv $(UV_VERSION) $@ && touch $@

environment: $(UV)
	@$(STEP) "environment: operator" $(UV) sync --frozen

environment-trainer: $(UV)
	@$(STEP) "environment: trainer" $(UV) sync --frozen --project trainer-image

environment-clients: $(UV)
	@$(STEP) "environment: client libraries" $(UV) sync --frozen --project tests/clients

environment-server: $(UV)
	@$(STEP) "environment: agent" $(UV) sync --frozen --project server-image
	@$(STEP) "environment: engine" $(UV) sync --frozen --project server-image/engine-cpu

verify-fuzz-manifests: environment ## Check 10,000 mutated manifests with models and plans, 1,000 with an API server and the operator
	@$(STEP) --last '^(passed|Assert)' "manifests: models and plans" $(RUN) python -m tests.finetune.manifest_fuzzer --count 10000
	@$(STEP) "programs of the cluster" $(CLUSTER) build
	@$(STEP) --last ' (passed|failed).* in ' "manifests: API server" $(RUN) pytest -m long tests/controlplane/test_manifest_fuzz.py

model: environment-trainer
	@$(STEP) "base model of the demo" python3 e2e/cluster/model.py

check-format:
	@$(STEP) "format" $(RUN) ruff format --check
	@$(STEP) "lint" $(RUN) ruff check

check-types:
	@$(STEP) "types: operator" $(RUN) mypy
	@$(STEP) "types: trainer" $(UV) run --frozen --no-sync --project trainer-image mypy --config-file pyproject.toml trainer-image/src
	@$(STEP) "types: agent" $(UV) run --frozen --no-sync --project server-image mypy --config-file pyproject.toml server-image/src

check-imports:
	@$(STEP) "import contracts" $(RUN) lint-imports
	@$(STEP) "import contracts: trainer" env PYTHONPATH=trainer-image/src $(RUN) lint-imports --config trainer-image/pyproject.toml
	@$(STEP) "import contracts: agent" env PYTHONPATH=server-image/src $(RUN) lint-imports --config server-image/pyproject.toml

check-generated:
	@$(STEP) "generated: CRDs and reference" $(RUN) $(GENERATE_CRDS) --check
	@$(STEP) "generated: values schema" $(RUN) python charts/values_schema.py --check
	@$(STEP) "generated: flags and settings" $(RUN) python charts/flags.py --check
	@$(STEP) "generated: metrics" $(RUN) python docs/metrics.py --check
	@$(STEP) "generated: errors" $(RUN) python docs/errors.py --check
	@$(STEP) "generated: default values" $(RUN) python charts/defaults.py --check
	@$(STEP) "generated: rights" $(RUN) python charts/rights.py --check
	@$(STEP) "generated: vLLM's architectures" $(RUN) python server-image/engine-cpu/lora_architectures.py --check
	@$(STEP) "versions of the charts" $(RUN) python charts/versions.py

check-unit:
	@$(STEP) "programs of the tests" .ci/test-programs
	@$(STEP) --last ' (passed|failed).* in ' "unit tests" $(RUN) pytest $(UNIT_TESTS)
