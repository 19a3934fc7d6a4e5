# Needs make, and Python 3.11 or newer with its venv module. Everything else goes into .venv, from the hash-locked
# requirements; nothing outside this folder is touched. Another interpreter: make PYTHON=/path/to/python3 ...

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

# Empty: the first of python3, python3.14 ... python3.11 that fits.
PYTHON ?=
# Given on to the program that a target runs: make test ARGS='-k crypto -x'
ARGS ?=
# How far `make lock` goes: empty keeps every version that still fits; LOCK=--upgrade takes the newest.
LOCK ?=
UV_VERSION := 0.13.9

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
PROTOS := protos/onetime/v1
UV := build/uv-$(UV_VERSION)/bin/uv
COMPILE := $(UV) pip compile --quiet --no-config --universal --python-version 3.11 --generate-hashes \
	--custom-compile-command 'make lock' --excludes build/excluded.txt $(LOCK)
# Wanted on Windows only, where uvloop does not run.
EXCLUDED := colorama tzdata

.PHONY: help serve test fuzz timing bench check generate lock clean
help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 18

serve: .venv/.project ## run the service on an embedded PostgreSQL, for trying it out (ARGS='--listen ...')
	@$(PY) -m service dev $(ARGS)

test: .venv/.project ## run the tests (ARGS='-k ...')
	@$(PY) -m pytest $(ARGS)

fuzz: .venv/.project ## send a million hostile requests to a server, for half an hour (ARGS='--requests 100000 --seed 7')
	@$(PY) tests/fuzz.py $(ARGS)

timing: .venv/.project ## measure whether the time of an answer tells an unknown subject from a wrong code (ARGS='--calls ...')
	@$(PY) tests/timing.py $(ARGS)

bench: .venv/.project ## measure how fast it is, and write docs/benchmarks.md; needs Go, and an hour and a half (ARGS='--quick', ARGS='--help')
	@$(PY) tests/bench.py $(ARGS)

check: check-lint check-format check-types check-layers check-sources check-packages check-protos check-dockerfile check-shell ## hold the sources against every rule that a tool can check

generate: .venv/.project ## make the stubs in generated/ from protos/
	@echo "stubs: $(PROTOS) -> generated"
	@rm -rf build/generated && mkdir -p build/generated
	@PATH="$$PWD/.venv/bin:$$PATH" $(PY) -m grpc_tools.protoc -Iprotos --python_out=build/generated \
		--grpc_python_out=build/generated --mypy_out=quiet:build/generated --mypy_grpc_out=quiet:build/generated \
		$(PROTOS)/*.proto
	@rm -rf generated/onetime && mkdir -p generated && mv build/generated/onetime generated/onetime

lock: .venv/.requirements $(UV) ## lock the requirements of pyproject.toml anew (LOCK=--upgrade: at their newest)
	@printf '%s\n' $(EXCLUDED) > build/excluded.txt
	@echo "lock: requirements/serve.txt"
	@$(COMPILE) pyproject.toml --output-file requirements/serve.txt
	@echo "lock: requirements/dev.txt"
	@$(COMPILE) pyproject.toml --extra dev --extra test --constraints requirements/serve.txt \
		--output-file requirements/dev.txt
	@echo "lock: requirements/build.txt"
	@$(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
		| $(COMPILE) - --constraints requirements/dev.txt --output-file requirements/build.txt

clean: ## remove what the other targets made, but not the data in .onetime
	@rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find service generated tests -name __pycache__ -prune -exec rm -rf {} +

.PHONY: check-lint check-format check-types check-layers check-sources check-packages check-protos check-dockerfile check-shell
check-lint: .venv/.project
	@echo "check: ruff"
	@$(PY) -m ruff check --quiet

check-format: .venv/.project
	@echo "check: ruff format"
	@$(PY) -m ruff format --check --quiet

check-types: .venv/.project
	@echo "check: mypy"
	@$(PY) -m mypy --no-error-summary service tests

check-layers: .venv/.project
	@echo "check: imports point one way"
	@PATH="$$PWD/.venv/bin:$$PATH" lint-imports > .venv/layers.log || { cat .venv/layers.log; exit 1; }

check-sources: .venv/.project
	@echo "check: stubs and docs against the sources"
	@$(PY) -m pytest --quiet --no-header -k 'not snippets' tests/test_generated.py tests/test_docs.py

check-packages: .venv/.project
	@echo "check: pip"
	@$(PIP) check > .venv/packages.log || { cat .venv/packages.log; exit 1; }

# The tools below are no libraries and stay out of .venv: .ci/run installs them, and there they must be.
check-protos:
	@$(call optional,buf,lint)

check-dockerfile:
	@$(call optional,hadolint,Dockerfile)

check-shell:
	@$(call optional,shellcheck,.ci/run)

define optional
if command -v $(1) > /dev/null; then echo "check: $(1) $(2)"; $(1) $(2); \
elif [ -n "$$CI" ]; then echo "check: $(1) is not on PATH, and CI must have it" >&2; exit 1; \
else echo "check: $(1) is not on PATH: skipped"; fi
endef

# .venv. Each stamp is written last, so that an interrupted set-up is done again from the start. The first one tells the
# folder and the checksum of the lock that it was made for: whatever else is there, such as one that was moved or whose
# interpreter is gone, is made anew.
WANTED := pwd -P && cksum < requirements/dev.txt
READY := $(shell test -x $(PY) && test "$$(cat .venv/.requirements 2> /dev/null)" = "$$($(WANTED))" && echo yes)
ifneq ($(READY),yes)
.PHONY: .venv/.requirements
endif

.venv/.requirements:
	@set -eu; \
	fail() { echo "$$1" >&2; echo "Name another interpreter with: make PYTHON=/path/to/python3" >&2; exit 1; }; \
	asked='$(PYTHON)'; python=$${asked:-python3}; \
	fits='import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))'; \
	for each in python3 python3.14 python3.13 python3.12 python3.11; do \
		if [ -z "$$asked" ] && "$$each" -c "$$fits" 2> /dev/null; then python=$$each; break; fi; \
	done; \
	"$$python" -c 'pass' 2> /dev/null || fail "$$python does not run. onetime needs Python 3.11 or newer."; \
	version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		fail "$$python is Python $$version. onetime needs 3.11 or newer."; \
	"$$python" -c 'import ensurepip, venv' 2> /dev/null || \
		fail "$$python has no venv module. On Debian and Ubuntu: apt-get install python3-venv"; \
	python=$$("$$python" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))'); \
	echo "set-up: .venv with Python $$version"; \
	rm -rf .venv; "$$python" -m venv .venv; \
	echo "set-up: requirements/dev.txt"; \
	$(PIP) install --require-hashes --requirement requirements/dev.txt; \
	{ $(WANTED); } > .venv/.requirements

.venv/.project: pyproject.toml .venv/.requirements
	@echo "set-up: onetime, editable"
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch .venv/.project

$(UV): | .venv/.requirements
	@echo "set-up: uv $(UV_VERSION)"
	@rm -rf build/uv-$(UV_VERSION) && $(PY) -m venv build/uv-$(UV_VERSION)
	@build/uv-$(UV_VERSION)/bin/python -m pip --disable-pip-version-check --quiet install uv==$(UV_VERSION)
