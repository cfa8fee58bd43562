# `make bench` and `make test` set up what they need in .venv and then run; a second call sets nothing up again. bench
# needs less: the CPU kernels for this processor, and the CUDA kernels and Triton where there is a GPU, for that alone.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
CXX_SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
BUILT_FROM := pyproject.toml CMakeLists.txt setup.py $(CXX_SOURCES)
# What runs on every x86-64 processor and on every NVIDIA GPU that is served.
EVERYWHERE := -DDIVNORM_INSTRUCTION_SETS=baseline;avx2;avx512 -DDIVNORM_CUDA_ARCHS=80;90;100;120

# Random calls that `make test` makes under sanitizers.
CPU_CALLS ?= 5000
CUDA_CALLS ?= 500
RACE_CALLS ?= 50

.PHONY: bench test emulated gpu-check native-test address-test race-test fuzz fuzz-address fuzz-races docs wheels lint \
	format clean

bench: $(if $(wildcard $(VENV)/.installed),$(VENV)/.installed,$(VENV)/.bench)
	$(BIN)/python -m bench run

test:
	$(MAKE) --jobs 3 emulated native-test
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal --durations 12
	$(MAKE) --jobs 2 fuzz-address fuzz-races

# The CUDA kernels for the emulated device, which the tests else build when they come to them, and wait for each other.
emulated: $(VENV)/.installed
	cd tests && ../$(BIN)/python -c "import emulated; emulated.module()$(if $(DIVNORM_NO_COSTS),,; emulated.counted())"

# On a machine with a GPU: tests, sanitizers and benchmark, with its own Python ($(PYTHON)) and no network. Eight minutes
# of it; called again, it goes on.
gpu-check:
	PYTHON="$(PYTHON)" bench/gpu_check.sh run

# The kernels without Python: under AddressSanitizer and UBSan, and for their barriers under ThreadSanitizer.
native-test: address-test race-test

address-test:
	cmake -S . -B build/native-tests -DDIVNORM_NATIVE_TESTS=ON -DDIVNORM_SANITIZE=address,undefined
	cmake --build build/native-tests --parallel --target divnorm_tests
	ctest --test-dir build/native-tests --output-on-failure

race-test:
	cmake -S . -B build/race-tests -DDIVNORM_NATIVE_TESTS=ON -DDIVNORM_SANITIZE=thread
	cmake --build build/race-tests --parallel --target divnorm_tests
	ctest --test-dir build/race-tests --output-on-failure

# Random calls under sanitizers, as many as one likes; TARGET: cpu, cuda (emulated) or races. Prints the smallest that
# fails.
TARGET := cpu
N := 5000
fuzz: $(VENV)/.installed
	cd tests && ../$(BIN)/python -m fuzz.run $(TARGET) $(N)

fuzz-address:
	$(MAKE) fuzz TARGET=cpu N=$(CPU_CALLS)
	$(MAKE) fuzz TARGET=cuda N=$(CUDA_CALLS)

fuzz-races:  # threads that wait for each other, most of the time
	$(MAKE) fuzz TARGET=races N=$(RACE_CALLS)

# The documentation, as HTML in build/docs.
docs: $(VENV)/.installed
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

# The source distribution and wheels of all Pythons here, in dist (docs/releasing.md).
wheels:
	PYTHON="$(PYTHON)" .ci/wheels "$(TORCH)"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf $(VENV) build dist divnorm_kernels/_native*.so divnorm_kernels/not_built.txt

# Torch first: asked for by a range, pip would take the newest build with its gigabytes of GPU libraries.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$(TORCH)"
	touch $@

$(VENV)/.bench: $(VENV)/.torch $(BUILT_FROM)
	if nvidia-smi -L > /dev/null 2>&1; then extras=bench,triton; \
	else extras=bench; export CMAKE_ARGS="-DDIVNORM_CUDA=off $$CMAKE_ARGS"; fi; \
	$(BIN)/python -m pip install --editable ".[$$extras]"
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(BUILT_FROM)
	CMAKE_ARGS="$(EVERYWHERE) $$CMAKE_ARGS" $(BIN)/python -m pip install --editable ".[bench,test,docs,lint]"
	$(BIN)/python -m pip install --no-deps timm torchvision  # they ask for torch, and would get its GPU libraries
	touch $@
