#!/usr/bin/env bash
# Builds the source distribution and of it a wheel for each Python and torch named, into dist/; checks them, and tries each wheel
# where there is no compiler: bash tools/build_wheels.sh [--tests] [PYTHON:TORCH ...], as 3.12:2.13.0 3.13:2.14.1
# By default for this python3 and every supported minor version of torch; python3.12 has to be on PATH for 3.12, g++ for all.
# A torch that cannot be had is left out. The environment variables of the build are those of setup.py.
# --tests runs the quick tests, too, with the compiler, and writes their last line to dist/PYTHON-TORCH.txt.
set -euo pipefail
cd "$(dirname "$0")/.."

tests=
[ "${1:-}" != --tests ] || { tests=yes && shift; }
python=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ $# -gt 0 ] || set -- "$python":{2.11.0,2.12.1,2.13.0,2.14.1,2.15.0}

# Of the op, its derivatives, vmap, torch.compile, the driver and the ensembles: one or two minutes.
quick_tests=(tests/test_{cross_entropy,cross_entropy_autograd,cross_entropy_compile,eager,hessian,double_backward}.py
  tests/test_{eigsh,tracker,perceptron_ensemble,packaging,readme}.py)
# What torch brings, the OpenMP runtime that it shares with us included: a second one would have threads of its own.
theirs=(--exclude 'libtorch*.so' --exclude 'libc10*.so' --exclude 'libcudart.so.*' --exclude libgomp.so.1)

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
step() { printf '\n=== %s\n' "$*"; }

step 'source distribution'
python3 -m venv "$scratch/tools"
python3 - <<'PYTHON' | xargs -d '\n' "$scratch/tools/bin/pip" install --quiet
import re
extra = re.search(r"^wheels = \[(.+)\]", open("pyproject.toml").read(), re.MULTILINE)[1]
print(*re.findall(r'"(.+?)"', extra), sep="\n") # tomllib came with Python 3.11
PYTHON
"$scratch/tools/bin/python" -m build --quiet --sdist --outdir "$scratch/sdist" .
"$scratch/tools/bin/twine" check --strict "$scratch"/sdist/*
mkdir -p dist "$scratch/sources"
cp "$scratch"/sdist/*.tar.gz dist
tar --extract --file="$(echo "$scratch"/sdist/*.tar.gz)" --directory="$scratch/sources" --strip-components=1

wheel_for() { # wheel_for PYTHON TORCH
  rm -rf "$scratch/venv" "$scratch/built" "$scratch/wheel"
  "python$1" -m venv "$scratch/venv"
  "$scratch/venv/bin/pip" install --quiet "torch==$2" || { echo "torch $2 is not to be had for Python $1"; return 0; }

  step "Python $1, torch $2: wheel" # the build has an environment of its own: this one keeps torch alone
  "$scratch/venv/bin/pip" wheel --quiet --no-cache-dir --no-deps --wheel-dir "$scratch/built" "$scratch"/sdist/*.tar.gz
  PATH=$scratch/tools/bin:$PATH auditwheel repair "${theirs[@]}" --wheel-dir "$scratch/wheel" "$scratch"/built/*.whl
  "$scratch/tools/bin/twine" check --strict "$scratch"/wheel/*.whl
  "$scratch/tools/bin/check-wheel-contents" "$scratch"/wheel/*.whl
  cp "$scratch"/wheel/*.whl dist

  step "Python $1, torch $2: README's example without a compiler"
  (
    cd "$scratch/wheel" && PATH=$scratch/venv/bin
    if command -v cc || command -v c++ || command -v g++ || command -v nvcc; then exit 1; fi
    python -m pip install --quiet ./*.whl "torch==$2"
    python -c 'import re, sys; print(re.search(r"```python\n(.*?)```", sys.stdin.read(), re.DOTALL)[1])' \
      <"$scratch/sources/README.md" >example.py
    python example.py
    dynloss-ext
  )

  [ -n "$tests" ] || return 0
  step "Python $1, torch $2: quick tests"
  "$scratch/venv/bin/pip" install --quiet "$(echo "$scratch"/wheel/*.whl)[test]" "torch==$2"
  (cd "$scratch/sources" && "$scratch/venv/bin/pytest" -q "${quick_tests[@]}") | tee "$scratch/tests.txt"
  version=$("$scratch/venv/bin/python" -c 'import torch; print(torch.__version__)')
  echo "$version: $(tail -n 1 "$scratch/tests.txt")" >"dist/$1-$2.txt"
}

for cell in "$@"; do
  [[ $cell == *:* ]] || { echo "expected PYTHON:TORCH, as 3.12:2.13.0, not $cell" >&2; exit 2; }
  wheel_for "${cell%%:*}" "${cell#*:}"
done
step 'dist/'
ls dist
