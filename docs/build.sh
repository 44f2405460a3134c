#!/bin/sh
# Builds the documentation into docs/_build/html; a warning is an error: sh docs/build.sh [options of sphinx-build]
# Needs the package with its extra `docs`, and no network. `-D plot_gallery=0` leaves the how-to scripts unexecuted.
set -eu
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" -m sphinx -W --keep-going -b html "$@" docs docs/_build/html
