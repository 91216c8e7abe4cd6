# Two commands do everything on a fresh machine: make demo, make test. Each makes .venv when it is missing.
# make test holds one run for each backend and family of methods; make test-full the whole matrix and every kill.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-full test-quantization bench lint docs format clean

$(VENV)/.installed: setup.py requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m llm_unlearn.cli.demo --output_dir demo_output

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=15

test-full: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=15 -m full

# Apart from the others and last: with bitsandbytes installed, every process takes three seconds more to start.
test-quantization: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[quantization]'
	$(BIN)/python -m pytest tests/test_quantize.py -m "full or not full"

# Real rows: make bench TOKENIZER="gpt2.json 20B_tokenizer.json" DATA_DIR=tofu; ten minutes on two cores.
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/training.py $(if $(TOKENIZER),--tokenizer $(TOKENIZER)) $(if $(DATA_DIR),--data_dir $(DATA_DIR)) \
		--output output/training.json --page docs/performance.md

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python utils/make_docs.py --check

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed
	$(BIN)/python utils/make_docs.py

clean:
	rm -rf $(VENV) demo_output build dist *.egg-info .pytest_cache .ruff_cache
