# make run    set up what is missing, then the whole pipeline on MovieLens-100K
# make test   set up what is missing, then every test, on two processes; TEST_PROCESSES=0: on one
# make faults kill ranks and launchers at every phase of training
# make fuzz   spoil configurations, manifests and files in thousands of ways
# make lint   what CI checks of style and types
# make audit  known holes of the pinned versions, where their list can be reached
# make doctor which parts are there and work

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
CONFIG ?= conf/movielens-100k.toml
TEST_PROCESSES ?= 2

.PHONY: run test faults fuzz lint audit docs doctor setup clean

run: setup
	$(BIN)/distrec run $(CONFIG)

test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n $(TEST_PROCESSES) --no-loadscope-reorder \
		--durations=15

# kills ranks and launchers everywhere; ends with a table of what each cost
faults: setup
	DISTREC_FAULTS=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults

# spoils configurations, manifests and files in thousands of ways, raw files too; reads one dataset in
# hundreds of passes
fuzz: setup
	DISTREC_FUZZ=3000 DISTREC_PASSES=200 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --timeout=3600 \
		tests/unit/test_fuzz.py tests/spark/test_fuzz_raw.py \
		tests/unit/test_reader.py::test_no_pass_loses_rows

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy distrec jobs

# in an environment of its own: it needs other versions than we do
audit:
	python3.11 -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet pip-audit
	$(VENV)-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --desc

# the reference is generated from the classes of distrec/config/
docs: setup
	$(BIN)/distrec config --reference > docs/configuration.md

doctor: setup
	$(BIN)/distrec doctor

setup: $(STAMP)

$(STAMP): setup.py constraints.txt distrec/horovod_build.py install-system-packages
	./install-system-packages
	python3.11 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24" -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/python -m distrec.horovod_build
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-audit build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
