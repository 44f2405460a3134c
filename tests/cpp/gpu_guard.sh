#!/usr/bin/env bash
# Builds gpu_guard.cu and the kernels for a device: bash tests/cpp/gpu_guard.sh build OUTPUT ARCH, such as sm_90.
# Needs nvcc (or $NVCC) alone. The program needs neither torch nor this folder.
set -euo pipefail

if [ "$#" -ne 3 ] || [ "$1" != build ]; then
  echo "usage: gpu_guard.sh build OUTPUT ARCH" >&2
  exit 2
fi
output=$(realpath "$2")
cd "$(dirname "$0")"
csrc=$(realpath ../../csrc)
flags=(-std=c++20 -O1 -arch="$3" --expt-relaxed-constexpr -lineinfo -I"$csrc" -I.
  -diag-suppress 20208) # the twin computes in long double, which a device has not

objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
"${NVCC:-nvcc}" "${flags[@]}" -c "$csrc/cuda/cross_entropy.cu" -o "$objects/kernels.o" &
"${NVCC:-nvcc}" "${flags[@]}" -c gpu_guard.cu -o "$objects/guard.o"
wait "$!"
"${NVCC:-nvcc}" -arch="$3" "$objects"/{kernels,guard}.o -o "$output"
