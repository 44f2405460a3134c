#!/bin/sh
# Makes the environment .venv and installs the package into it, with the extras named: sh tools/setup.sh [test,...]
# A torch that .venv already has is kept; else version $TORCH is installed.
set -eu
cd "$(dirname "$0")/.."

include=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')
if [ ! -f "$include/Python.h" ]; then
  echo "Python.h is not in $include: installing python3-dev"
  as_root=$([ "$(id -u)" = 0 ] || echo sudo)
  $as_root apt-get update
  $as_root apt-get install -y --no-install-recommends python3-dev
fi

python3 -m venv .venv
[ -d "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/torch" ] ||
  .venv/bin/pip install "torch==${TORCH:-2.13.0}"
.venv/bin/pip install ".${1:+[$1]}"
