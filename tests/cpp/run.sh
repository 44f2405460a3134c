#!/bin/sh
# Builds every tests/cpp/test_*.cpp with plain g++ under the address and undefined-behaviour sanitizers, and runs it.
# They need neither torch nor a GPU. A program passes if it exits with 0.
set -eu
cd "$(dirname "$0")/../.."

build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
for source in tests/cpp/test_*.cpp; do
  program=$build/$(basename "$source" .cpp)
  "${CXX:-g++}" -std=c++20 -O1 -g -Wall -Wextra -Werror -fsanitize=address,undefined -fno-sanitize-recover=all \
    -fno-omit-frame-pointer -Icsrc -Itests/cpp "$source" -o "$program"
  echo "$(basename "$source")"
  "$program"
done
