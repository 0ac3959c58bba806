# make run    a scoreboard with everything it needs: PORT=8081, DEV_ARGS=--no-demo, any setting by its name
# make test   the tests, in parallel: PYTEST_ARGS='-k redis'; PARALLEL= runs one after the other
# make check  formatter, linter, types, tests
# make bench  the scoreboard beside its peers, about 20 minutes: BENCH_ARGS. Needs Java and Maven, and for two of the
#             peers Node.js 20 and Go; writes bench/results.json, docs/bench-results.md and docs/bench.png
# make bench-quick  the same in two minutes, the setting up not counted; writes bench/results.json
# make bench-live  the live board with many watchers: CLIENTS=1000 RATE=2000 SECONDS=20 SCORES=all STUCK=500. Its last
#             line is one JSON object; without CLIENTS it prints a table and the last line is a list of such objects
# make chaos  kill everything, again and again, and count: CHAOS_SEED, CHAOS_KILLS, CHAOS_RATE; CHAOS_ARGS=losses|outages
# make audit  known holes in what is installed (asks PyPI), and docs/licences.md made anew
# make bench-growth   cost by players, watchers and rows of history, with plots in docs/: BENCH_ARGS='--players 1e4,1e7'
# make bench-sustain  the highest rate that everything keeps up with for SECONDS=300: BENCH_ARGS='--rate 8000'
# Each sets up .venv first, where needed.

# Each process begins with a part of its own, since a file's tests share servers, and takes over from others at the end.
PARALLEL = -n auto --dist worksteal

.PHONY: run test check bench bench-quick bench-live bench-growth bench-sustain chaos audit setup setup-tests setup-bench

run: setup
	@.venv/bin/python -m server dev $(DEV_ARGS)

test: setup-tests
	.venv/bin/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

check: setup-tests
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/python -m mypy
	.venv/bin/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

bench: setup-bench
	.venv/bin/python -m bench $(BENCH_ARGS)

bench-quick: setup-bench
	.venv/bin/python -m bench --quick $(BENCH_ARGS)

bench-live: setup
	@.venv/bin/python -m bench.live $(if $(CLIENTS),--clients $(CLIENTS)) $(if $(RATE),--rate $(RATE)) \
	    $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SCORES),--scores $(SCORES)) $(if $(STUCK),--stuck $(STUCK))

chaos: setup
	@.venv/bin/python -m chaos $(CHAOS_ARGS)

# --strict: a package that could not be looked up is a failure, not a pass.
audit:
	@scripts/setup.sh embedded,test,audit
	.venv/bin/python scripts/licences.py >docs/licences.md
	.venv/bin/python -m pip_audit --strict --progress-spinner off --disable-pip --no-deps -r constraints.txt

setup:
	@scripts/setup.sh embedded,test

setup-tests:
	@scripts/setup.sh embedded,test tests

setup-bench:
	@scripts/setup.sh embedded,test,bench bench

bench-growth: setup-bench
	.venv/bin/python -m bench.growth $(BENCH_ARGS)

bench-sustain: setup-bench
	.venv/bin/python -m bench.sustain $(if $(SECONDS),--seconds $(SECONDS)) $(BENCH_ARGS)
