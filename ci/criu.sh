#!/bin/bash
# criu.sh NEEDS: runs tests/criu on node n1 of the testbed, where CRIU and the installed product are; NEEDS is
# what the tests may not skip. Ends with pytest's exit code.
set -euo pipefail

needs=$1
shift
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
place=/tmp/outlast-tests

# Only the tests: the product under test is the one that is installed on the node.
tar --create --exclude=__pycache__ --exclude=build --owner=0 --group=0 setup.cfg tests/conftest.py tests/criu tests/programs |
	scripts/testbed exec n1 sh -c "rm -rf $place && mkdir $place && tar -C $place --extract"
exec scripts/testbed exec n1 env -C "$place" OUTLAST_TEST_NEEDS="$needs" PYTHONDONTWRITEBYTECODE=1 \
	python3 -m pytest -p no:cacheprovider -m '' --durations=5 --durations-min=5 "$@" tests/criu
