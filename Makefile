# `make run` and `make test` install what they need. Settings are environment variables, SPARSELINE_DEVICE and others: see docs/settings.md.
# The Python of the environment: the first of these that runs and is 3.11 to 3.14.
PYTHONS := python3.11 python3 python3.12 python3.13 python3.14
RIGHT := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for python in $(PYTHONS); do if $$python -c '$(RIGHT)' 2>/dev/null; then echo $$python; break; fi; done)
VENV ?= .venv
BIN := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))/bin
export PATH := $(BIN):$(PATH)
# Otherwise waiting threads spin: beside another busy process everything takes five to ten times as long.
export OMP_WAIT_POLICY ?= PASSIVE
# glibc keeps freed blocks of up to 32 MiB (fewer page faults) and returns larger ones. If it kept these, small blocks could
# fragment their holes in the heap, which costs hundreds of MB in some runs. All threads share one heap.
export MALLOC_TRIM_THRESHOLD_ ?= 2000000000
export MALLOC_MMAP_THRESHOLD_ ?= 33554432
export MALLOC_ARENA_MAX ?= 1

.PHONY: run submit test campaign campaign-short architectures sshd slurm check format wheel docs plan sweep screenshots environment clean
.PHONY: bench-induction bench-sparsity bench-reconstruction bench-quantization bench-rivals rivals-environment llama-environment bench-llama bench-real bench-papers bench-sources bench-calibration-text bench-latency bench-busy bench-verify
.PHONY: bench-sweep bench-block bench-gpu bench-planned bench-processes

run: environment  ## run all stages that are out of date, print the table and the path of the report
	@git rev-parse --git-dir >/dev/null 2>&1 || dvc config --local core.no_scm true  # an archive without .git
	python -m stages.preload dvc repro
	@echo; python -m stages.costs; echo; echo "report: report/index.html"

submit: environment  ## variants as jobs (docs/cluster.md): VARIANTS, all without; OPTIONS='--sbatch mem=64G', or OPTIONS=--local for processes of this machine
	python -m stages.submit $(OPTIONS) $(VARIANTS)

test: environment sshd  ## the whole test suite
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

MINUTES ?= 60
campaign: environment slurm  ## random kills and hostile inputs for MINUTES, with a printed seed; then tests with more instances than `make test`
	python tests/campaign.py all --minutes $(MINUTES) --record benchmarks/results/campaign.json
	python -m pytest -m campaign

campaign-short: environment  ## a few of them with a fixed seed, as in CI
	python -m pytest -n 2 -m short_campaign tests/test_campaign.py

architectures: environment  ## test every causal-LM model type of the installed transformers that has no record, as a tiny model
	python tests/architectures.py

sshd:  ## for the tests over SSH; installed only in a container, because elsewhere the Debian package would open port 22
	@test -x /usr/sbin/sshd || { test ! -d /run/systemd/system && apt-get update -qq && apt-get install -y -qq --no-install-recommends openssh-server; } \
		|| echo "no sshd, so the tests over SSH are skipped (Debian: apt-get install openssh-server)"

slurm:  ## for the tests of jobs: installed in a container only, since elsewhere the Debian packages would start services
	@test -x /usr/sbin/slurmctld || { test ! -d /run/systemd/system && apt-get update -qq && apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge; } \
		|| echo "no Slurm, so the tests on it are skipped (Debian: apt-get install slurmctld slurmd slurm-client munge)"

check: environment  ## formatting, lint, types, and the prose of the pages
	ruff format --check .
	ruff check .
	mypy
	python tests/prose.py
	proselint check --config .proselintrc.json README.md CHANGELOG.md docs/*.md

wheel: environment  ## build the wheel, and try the command `sparseline` in a new environment (docs/install.md)
	.ci/wheel

docs: environment  ## build the documentation as static pages below site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 mkdocs build

format: environment  ## correct formatting, and lint errors if possible
	ruff format .
	ruff check --fix .

bench-induction bench-sparsity bench-reconstruction bench-quantization: bench-%: environment  ## run a study on the test models: cells without a file, then the tables (docs/results.md)
	python -m benchmarks.studies run $*

rivals-environment:  ## install llm-compressor in a separate environment, for bench-rivals, bench-block and bench-gpu
	$(PYTHON) -m venv .rivals
	.rivals/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.rivals/bin/python -m pip install --quiet --disable-pip-version-check llmcompressor==0.14.0.1 compressed-tensors==0.19.0 "transformers>=5.15,<5.18"

llama-environment:  ## build llama.cpp from llama-cpp-python's source in an environment of its own, for bench-llama (needs cmake and a C++ compiler)
	$(PYTHON) -m venv .llama
	.llama/bin/python -m pip install --quiet --disable-pip-version-check --no-binary llama-cpp-python llama-cpp-python==0.3.36

bench-llama: environment  ## read a GGUF file of each kind with llama.cpp, and compare its continuations with transformers' (docs/formats.md)
	python -m benchmarks.gguf_files

bench-rivals: environment  ## compare presets and baselines with llm-compressor on the test models; then their costs (needs an idle machine)
	python -m benchmarks.studies run rivals
	python -m benchmarks.studies run rivals_cost

bench-real: environment  ## measure a real language model (docs/results.md): cells without a record; ONLY: 'table=main method=fast'; CELL: one to compute again
	python -m benchmarks.real run $(foreach one,$(ONLY),--only '$(one)') $(if $(CELL),--cell '$(CELL)')

bench-papers: environment  ## lay out both papers' tables for MODEL, a name on the hub or a directory (docs/results.md)
	python -m benchmarks.papers $(if $(MODEL),'$(MODEL)') --out '$(or $(OUT),papers)'

bench-sources: environment  ## show which blocks of the real language model lose most when pruned (docs/results.md); ONLY: 'method=fast'; CELL: one to compute again
	python -m benchmarks.sources run $(foreach one,$(ONLY),--only '$(one)') $(if $(CELL),--cell '$(CELL)')

bench-calibration-text: environment  ## measure the real language model, calibrated on four texts (docs/results.md): cells without a record; ONLY: 'source=C4 method=fast'; CELL: one to compute again
	python -m benchmarks.calibration_text run $(foreach one,$(ONLY),--only '$(one)') $(if $(CELL),--cell '$(CELL)')

bench-busy: environment  ## compare dvc repro beside a busy process and on an idle machine (needs an idle machine)
	python -m benchmarks.busy

bench-latency: environment  ## measure the effect of sparsity on speed: 2:4 on a GPU, or zeros on this CPU
	python -m benchmarks.latency

ROWS ?= 4096
COLUMNS ?= 4096
bench-sweep: environment  ## compare the OBS sweep of a ROWS x COLUMNS matrix with its products alone, on one CPU thread
	python -m benchmarks.sweep $(ROWS) $(COLUMNS)

BLOCKS ?= llama-7b,sparsegpt,8192
bench-block: environment  ## measure time and memory of one decoder block of real size; BLOCKS: rows (shape,method,tokens) to measure again
	python -m benchmarks.block $(BLOCKS)

bench-processes: environment  ## compare stages on two processes and on one, at width 1,024 (needs an idle machine); STAGES: those to measure again
	python -m benchmarks.processes $(STAGES)

bench-gpu: environment  ## complete the table of speeds of SPARSELINE_DEVICE; MODEL: a checkpoint to use in the place of random weights
	python -m benchmarks.gpu $(if $(MODEL),--model '$(MODEL)')

SHAPE ?= llama-70b
bench-planned: environment  ## what `make plan` says of a model of 70 billion parameters on 1, 4 and 8 GPUs of 80 GB (no weights are needed)
	python -m benchmarks.planned $(SHAPE)

STUDIES := induction sparsity reconstruction quantization rivals rivals_rows
bench-verify: environment  ## compute recorded cells again: CELLS random ones per study, or one: make bench-verify STUDIES=sparsity CELL='llama,unstructured,0.5,predicted,obs,0'
	@for study in $(STUDIES); do python -m benchmarks.studies verify $$study $(if $(CELL),--cell '$(CELL)',--count $(or $(CELLS),3)) || exit 1; done

plan: environment  ## predict memory, disk and rough time for the configured model, before anything runs
	python -m stages.plan

# Ready-made sweeps: `make sweep-sparsity`. VARIANT: whose allocation sweep-allocation changes.
VARIANT ?= best
sweep-sparsity: SET = prune.selection.sparsity=0.3,0.4,0.5,0.6,0.7,0.8
sweep-pattern: SET = prune.selection.pattern=unstructured,"2:4","4:8"
sweep-lambda: SET = induce.spectral.weight=0,0.001,0.01,0.1,1
sweep-induction-alpha: SET = induce.spectral.alpha=0.5,1,2,4
sweep-allocation: SET = variants.$(VARIANT).allocation.alpha=0.05,0.1,0.15,0.2,0.3
sweep-rows: SET = texts.calibration.rows=32,64,128,256
SWEEPS := sweep-sparsity sweep-pattern sweep-lambda sweep-induction-alpha sweep-allocation sweep-rows

.PHONY: $(SWEEPS)
sweep $(SWEEPS): environment  ## queue an experiment per value, or per combination: make sweep SET='a.key=1,2 b.key=3,4' (docs/experiments.md)
	@test -n '$(SET)' || { echo "make sweep: SET is missing, e.g. SET='prune.selection.sparsity=0.5,0.6'"; exit 2; }
	dvc exp run --queue $(foreach one,$(SET),-S '$(one)')
	@echo "next: dvc queue start, dvc queue status until all have ended, dvc exp show (docs/experiments.md)"

screenshots:  ## docs/report-*.png from report/index.html, with chromium
	sh docs/screenshots.sh

environment: $(VENV)/.ready
	@python -m stages.environment

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 to 3.14 with venv is here; install one (Debian: apt-get install python3-venv)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
	python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:  ## remove the environment; artifacts stay in DVC's cache
	rm -rf "$(VENV)"
