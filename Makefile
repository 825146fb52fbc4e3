PYTHON ?= python3
BIN := .venv/bin
LABEL := .venv-label/bin
DEPLOY := .venv-deploy/bin

.PHONY: demo test check-bundles lint dist docs label-environment label-server label-check deploy-check

# The whole workflow on generated phantoms, offline: train, predict, draw overlays, evaluate.
demo: .venv/installed
	rm -rf demo
	$(BIN)/medseg demo --output demo

# One single-threaded process per core, which is faster than one process on all cores. Neighboring tests run in the same
# process and share fixtures.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -m "not full_check"

# Full check of every shipped bundle: training, evaluation, inference and export with medseg and MONAI, about a minute
# per bundle. As tests, in parallel: pytest -n auto -m full_check
check-bundles: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/medseg bundle check --all --full

# Build the documentation in site/, and check links, anchors and navigation.
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

# Build wheel and source archive in dist/. For a release, make dist VERSION=0.1.0 also checks the version in all files.
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

# Run the label server for 3D Slicer and OHIF: make label-server STUDIES=folder [OPTIONS="--port 8010"]
label-server: .venv-label/installed
	$(LABEL)/medseg label serve --studies "$(STUDIES)" $(OPTIONS)

# End-to-end check of the label server over HTTP, against the masks of `medseg predict`.
label-check: .venv/installed .venv-label/installed
	OMP_NUM_THREADS=1 $(LABEL)/python tests/label/server_check.py

label-environment: .venv-label/installed

# Separate environment, since MONAI Label needs older versions of shared packages. The constraints are complete, so only
# dependencies of torch are resolved.
.venv-label/installed: constraints-label.txt
	test -x $(LABEL)/python || $(PYTHON) -m venv .venv-label
	$(LABEL)/pip install --quiet --constraint constraints-label.txt torch
	$(LABEL)/pip install --quiet --no-deps --requirement constraints-label.txt
	$(LABEL)/pip install --quiet --no-deps --editable .
	touch $@

# Check of the MONAI Deploy example: its DICOM SEG must equal that of `medseg predict` frame by frame.
deploy-check: .venv/installed .venv-deploy/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/deploy/deploy_check.py

# Separate environment, since the SDK depends on CUDA packages.
.venv-deploy/installed: docs/monai-deploy/constraints.txt
	test -x $(DEPLOY)/python || $(PYTHON) -m venv .venv-deploy
	$(DEPLOY)/pip install --quiet --constraint docs/monai-deploy/constraints.txt --editable ".[dicom]" monai-deploy-app-sdk
	touch $@
