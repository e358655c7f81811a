# `make demo` runs the main job on a tiny model; `make test` checks everything. Both make .venv first when it is missing.
PYTHON ?= python3
# A further package index to take torch from: PyTorch's own one for CPUs spares the CUDA libraries.
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# mypy sees the folders as one package through links, which a source distribution does not hold
TYPING := .typing/qwen2vl_tc

# kills of `make torture`, and mutations of `make fuzz`
RUNS ?=

# Whether `make measure` also takes the figures that need hours.
ALL ?=

# Interpreters of `make newest`, and whether torch (gigabytes each) comes with them.
PYTHONS ?= $(foreach each,python3.11 python3.12 python3.13,$(shell command -v $(each)))
TORCH ?= yes
# What is tested without torch: files, video, pictures, fetching, requests.
WITHOUT_TORCH := $(addprefix tests/,artifacts/test_integrity.py artifacts/test_safetensors.py artifacts/test_store.py \
	runtime/test_picture_modes.py runtime/test_text.py runtime/test_video.py runtime/test_vision_fuzz.py \
	runtime/test_vision_sources.py toolchain/test_cli_requests.py)
ifeq ($(TORCH),yes)
NEWEST := '.[test,onnx]'
FAST := tests
else
NEWEST := '.[onnx,sign,video]' hypothesis pytest pytest-xdist safetensors
FAST := $(WITHOUT_TORCH)
endif

.PHONY: demo test lint setup torture fuzz measure newest

demo: $(READY)
	$(BIN)/qwen2vl-tc demo

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)
	mkdir -p $(TYPING)
	for each in artifacts exporters runtime toolchain package/__init__.py package/__main__.py package/py.typed; \
		do ln -sfn ../../$$each $(TYPING)/$${each##*/}; done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p qwen2vl_tc

# Kills, starves and races the commands that write artifacts.
torture: $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m torture.runner $(if $(RUNS),--runs $(RUNS))

# Loads artifacts with damaged and hostile files, of GE graphs and of ONNX models; gives the command line odd words.
fuzz: $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m fuzz.runner $(if $(RUNS),--runs $(RUNS))

# The figures of docs/MEASURED.md, as rows of its table.
measure: $(READY)
	$(BIN)/python benchmarks/measure.py $(if $(ALL),--all)

# The newest version of each dependency that pyproject.toml allows, on each Python that is here, and the suite's fast part.
newest:
	@test -n "$(PYTHONS)" || { echo "no python3.11, 3.12 or 3.13 here; name some with PYTHONS="; exit 1; }
	@for python in $(PYTHONS); do \
	    venv=build/newest/$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])') && \
	    echo "== $$python: $$venv" && \
	    $$python -m venv --clear $$venv && \
	    $$venv/bin/python -m pip install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e $(NEWEST) && \
	    $$venv/bin/python -m pip list && \
	    $$venv/bin/python -m pytest -q -n 2 --dist loadfile -m 'not slow' $(FAST) || exit 1; \
	done

setup: $(READY)

# The stamp is written last: a set-up that was interrupted is finished, one whose interpreter is gone is made anew.
$(READY): pyproject.toml constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[test,onnx]'
	touch $(READY)
