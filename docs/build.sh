#!/bin/sh
# Builds the documentation into docs/_build/html; a warning is an error: sh docs/build.sh [options of sphinx-build]
# Needs the package with its extra `gallery`, in $PATH or .venv, and no network; with `-D plot_gallery=0`, which leaves the how-to
# scripts alone, `docs` is enough.
# Not `python -m sphinx`: from here the sources would hide an installed package.
set -eu
cd "$(dirname "$0")/.."
command -v sphinx-build >/dev/null || PATH="$PWD/.venv/bin:$PATH"
exec sphinx-build -W --keep-going -b html "$@" docs docs/_build/html
