PYTHON ?= python3
BIN := .venv/bin
LABEL := .venv-label/bin
DEPLOY := .venv-deploy/bin

.PHONY: demo test check-bundles lint dist docs label-environment label-server label-check deploy-check

# The whole circle on generated phantoms, offline: train, predict, score, picture.
demo: .venv/installed
	rm -rf demo
	$(BIN)/medseg demo --output demo

# One process a core, each on one thread: faster than one process on all of them. Tests that lie side by side go to one
# process, so that what several of them need is made once.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -m "not full_check"

# Every shipped bundle trains, scores, predicts and exports, by medseg and by MONAI; a minute each. With assertions, one
# bundle a core: pytest -n auto -m full_check
check-bundles: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/medseg bundle check --all --full

# The documentation into site/, with links, anchors and navigation checked.
docs: .venv/installed
	test -x $(BIN)/mkdocs || $(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

# Wheel and source archive in dist/. For a release, make dist VERSION=0.1.0 first checks that all places say so.
dist: .venv/installed
ifdef VERSION
	grep -x '__version__ = "$(VERSION)"' medseg/version.py
	grep -x 'version: $(VERSION)' CITATION.cff
	grep -x '## $(VERSION) (20[0-9][0-9]-[01][0-9]-[0-3][0-9])' CHANGELOG.md
endif
	rm -rf dist
	$(BIN)/python -m build

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# MONAI Label with medseg's bundles, for 3D Slicer and OHIF: make label-server STUDIES=folder [OPTIONS="--port 8010"]
label-server: .venv-label/installed
	$(LABEL)/medseg label serve --studies "$(STUDIES)" $(OPTIONS)

# The server over HTTP as viewers use it, step by step, against the masks of `medseg predict`.
label-check: .venv/installed .venv-label/installed
	OMP_NUM_THREADS=1 $(LABEL)/python tests/label/server_check.py

label-environment: .venv-label/installed

# An environment of its own: MONAI Label needs older versions than medseg's own environment has. The list is complete,
# so nothing is resolved but what torch's own build asks for.
.venv-label/installed: constraints-label.txt
	test -x $(LABEL)/python || $(PYTHON) -m venv .venv-label
	$(LABEL)/pip install --quiet --constraint constraints-label.txt torch
	$(LABEL)/pip install --quiet --no-deps --requirement constraints-label.txt
	$(LABEL)/pip install --quiet --no-deps --editable .
	touch $@

# The example for MONAI Deploy: DICOM SEG from its application, frame by frame against that of `medseg predict`.
deploy-check: .venv/installed .venv-deploy/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/deploy/deploy_check.py

# The SDK brings CUDA packages, so it is no dependency of medseg's.
.venv-deploy/installed: docs/monai-deploy/constraints.txt
	test -x $(DEPLOY)/python || $(PYTHON) -m venv .venv-deploy
	$(DEPLOY)/pip install --quiet --constraint docs/monai-deploy/constraints.txt --editable ".[dicom]" monai-deploy-app-sdk
	touch $@
