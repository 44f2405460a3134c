#!/bin/sh
# Makes the environment .venv and installs the package into it, with what the examples need and the extras named:
# sh tools/setup.sh [test,...]
# A torch that .venv already has is kept; else version $TORCH is installed.
set -eu
cd "$(dirname "$0")/.."

include=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')
if [ ! -f "$include/Python.h" ]; then # Debian keeps it in a package of its own
  echo "Python.h is not in $include: installing python3-dev"
  as_root=$([ "$(id -u)" = 0 ] || command -v sudo) || { echo "not root, no sudo: have python3-dev installed" >&2; exit 1; }
  $as_root apt-get update
  $as_root apt-get install -y --no-install-recommends python3-dev
fi

python3 -m venv .venv
.venv/bin/pip show --quiet torch 2>/dev/null || .venv/bin/pip install "torch==${TORCH:-2.13.0}"
.venv/bin/pip install ".[examples${1:+,$1}]"
