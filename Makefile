PYTHON ?= python3
SPEC ?= experiments/digits.yaml

# Tests and experiments that want more than the bundled digits find it here; without it they skip.
ifneq ($(wildcard ../shared/data),)
export QSWEEP_DATA ?= $(abspath ../shared/data)
endif

.PHONY: demo test check schema venv venv-test clean

demo: venv  ## run the demo sweep, print its front and where to look
	.venv/bin/qsweep run $(SPEC)

test: venv-test  ## run the test suite, files side by side
	.venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

check: venv-test  ## lint, format, types, layers, import weight
	scripts/check

venv: .venv/.installed
venv-test: .venv/.installed-test

# found before a folder `qsweep`, such as that of this clone, in which a person may work
EDITABLE = --config-settings editable_mode=compat

# torch first: what follows is then content with the version that is there
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qsweep needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt $(EDITABLE) -e .
	touch $@

.venv/.installed-test: .venv/.installed
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt $(EDITABLE) -e '.[test,cuda,executorch,litert,openvino]'
	touch $@

clean:  ## forget the environment and the results of sweeps
	rm -rf .venv experiments/sweeps

schema: venv  ## write the JSON schema of a spec, which editors complete from
	.venv/bin/qsweep schema > docs/spec.schema.json
