#!/bin/sh
# Makes the environment .venv and installs the package into it, with what the examples need and the extras named:
# sh tools/setup.sh [test,...]
# A torch that .venv already has is kept; else version $TORCH is installed. $PYTHON is the Python to take, 3.10 or newer.
set -eu
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || version=missing
case $version in
  missing | [0-2].* | 3.[0-9])
    echo "$python: expected Python 3.10 or newer, got $version; PYTHON=python3.12 sh tools/setup.sh takes another" >&2
    exit 1 ;;
esac

include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
if [ ! -f "$include/Python.h" ]; then # Debian keeps it in a package of its own
  echo "Python.h is not in $include: installing python3-dev"
  as_root=$([ "$(id -u)" = 0 ] || command -v sudo) || { echo "not root, no sudo: have python3-dev installed" >&2; exit 1; }
  $as_root apt-get update
  $as_root apt-get install -y --no-install-recommends python3-dev
fi

"$python" -m venv .venv
if ! .venv/bin/pip show --quiet torch 2>/dev/null; then
  torch=${TORCH:-2.13.0}
  echo "Installing torch $torch, with CUDA if your package index has it so; without, 200 MB instead of gigabytes:"
  echo "  TORCH=${torch%%+*}+cpu PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu sh tools/setup.sh $*"
  .venv/bin/pip install "torch==$torch"
fi
.venv/bin/pip install ".[examples${1:+,$1}]"
