# make demo    a bot on embedded SQLite, end to end
# make shop    a Flask shop with a bot: its pages in a browser, the chat in the terminal
# make test    all tests, on SQLite and PostgreSQL, and on MariaDB where one answers
# make chaos   servers are killed and networks cut while processes write; prints figures, 5 minutes
# make cluster  as chaos, on Patroni, Galera and PgBouncer: see tests/cluster/install.sh; as root
# make bench   everything that a user would pick instead, side by side; prints figures
# make docs    the documentation as a site, in build/docs; a warning is an error
# make lint    ruff, mypy --strict, pyright
# Tests run in PROCESSES at a time: more than two cores have work for, since many of them wait.
# Everything is installed into .venv; PYTHON names the interpreter it is made with.

PYTHON ?= python3
VENV ?= .venv
EXTRA ?= test
CONSTRAINTS ?=
PROCESSES ?= 4
BIN := $(VENV)/bin

.PHONY: demo shop test chaos cluster bench docs lint clean

demo: $(VENV)/aiosqlite.installed
	$(BIN)/python examples/demo.py

shop: $(VENV)/test.installed
	PYTHONPATH=examples $(BIN)/python -m legacy_shop

test: $(VENV)/$(EXTRA).installed
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist worksteal $(TESTS)

chaos: $(VENV)/$(EXTRA).installed
	$(BIN)/python -m pytest tests/chaos --capture=no

cluster: $(VENV)/$(EXTRA).installed
	$(BIN)/python -m pytest tests/cluster --capture=no $(OPTIONS)

bench: $(VENV)/test.installed
	$(BIN)/python -m benchmarks

docs: $(VENV)/dev.installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs

lint: $(VENV)/dev.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

# The extra of that name, with all that it needs.
$(VENV)/%.installed: setup.cfg setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]' $(CONSTRAINTS:%=--constraint %)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
