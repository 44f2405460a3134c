#!/usr/bin/env bash
# Host tests under AddressSanitizer and UndefinedBehaviorSanitizer: csrc/core, small_eigen, and the CUDA kernels in an
# emulator (emulator/cuda_runtime.h), also by the test for a device (gpu_guard.cu). Then faults are planted into
# copies of the kernels, each of which the tests must find. Usage: bash tests/cpp/run.sh; needs g++ (or $CXX) with C++20.
set -euo pipefail
cd "$(dirname "$0")"

build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
csrc=$(realpath ../../csrc)
common=(-std=c++20 -fno-strict-aliasing -Wall -Wextra -Wno-unknown-pragmas -Iemulator -I.)
sanitize=(-fsanitize=address,undefined -fno-sanitize-recover=all)

compile() { "${CXX:-g++}" "${common[@]}" "$@"; }

# in_parallel COMMAND...: runs commands, each one string, as many at a time as there are processors; the
# output of each in one piece. Fails if one does. A command that passed leaves a file: a shell forgets the status
# of a child when a later one is given its number, as happens after so many.
in_parallel() {
  local i=0 job
  rm -f "$build"/passed.*
  for job in "$@"; do
    while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do sleep 0.1; done
    i=$((i + 1))
    (eval "$job"; : >"$build/passed.$i") >"$build/job.$i" 2>&1 &
  done
  wait
  local failed=0 k
  for ((k = 1; k <= i; ++k)); do
    cat "$build/job.$k"
    [ -e "$build/passed.$k" ] || failed=1
  done
  return $failed
}

checked=(-O1 -g "${sanitize[@]}" -I"$csrc")
in_parallel \
  'compile "${checked[@]}" -c test_cuda_kernels.cpp -o "$build/tests.o"' \
  'compile "${checked[@]}" -x c++ -c "$csrc/cuda/cross_entropy.cu" -o "$build/kernels.o"' \
  'compile "${checked[@]}" -c test_cuda_perceptron.cpp -o "$build/perceptron_tests.o"' \
  'compile "${checked[@]}" -x c++ -c "$csrc/cuda/perceptron.cu" -o "$build/perceptron_kernels.o"' \
  'compile -O1 -I"$csrc" -c test_cuda_perceptron.cpp -o "$build/plain_perceptron_tests.o"' \
  'compile -O2 -DANNOTATE_FIBERS -c emulator/emulator.cpp -o "$build/emulator.o"' \
  'compile "${checked[@]}" test_core.cpp -o "$build/core"' \
  'compile "${checked[@]}" test_small_eigen.cpp "$csrc/lanczos/small_eigen.cpp" -o "$build/small_eigen"' \
  '"${CXX:-g++}" -std=c++20 -Wall -Wextra -Istreams -I. "${checked[@]}" test_arrival_counters.cpp \
    "$csrc/cuda/arrival_counters.cpp" -o "$build/arrivals"' \
  'compile -O1 -I"$csrc" -c test_cuda_kernels.cpp -o "$build/plain_tests.o"' \
  'compile -O1 -I"$csrc" -x c++ -c gpu_guard.cu -o "$build/plain_guard.o"' \
  'compile -O1 -I"$csrc" -x c++ -c "$csrc/cuda/cross_entropy.cu" -o "$build/plain_kernels.o"' \
  'compile -O1 -c emulator/emulator.cpp -o "$build/plain_emulator.o"'
compile "${sanitize[@]}" "$build"/{tests,kernels,emulator}.o -o "$build/kernels"
compile "${sanitize[@]}" "$build"/{perceptron_tests,perceptron_kernels,emulator}.o -o "$build/perceptrons"
compile "$build"/plain_{guard,kernels,emulator}.o -o "$build/guard"

# faulty COPY FILE SED-SCRIPT: the kernels and their tests in the folder COPY, with the script applied to the
# file.
faulty() {
  local copy=$1
  shift
  cp -r "$csrc/core" "$csrc/cuda" "$copy"
  sed -i "$2" "$copy/cuda/$1"
  if cmp -s "$copy/cuda/$1" "$csrc/cuda/$1"; then echo "does not apply: $1: $2"; return 1; fi
  compile -w -O0 -I"$copy" -x c++ -c "$copy/cuda/cross_entropy.cu" -o "$copy/kernels.o"
  compile "$copy/kernels.o" "$build"/plain_{tests,emulator}.o -o "$copy/kernels"
  compile "$copy/kernels.o" "$build"/plain_{guard,emulator}.o -o "$copy/guard"
}

# found WHAT COMMAND...: succeeds if the command fails, and tells by what. On a busy machine it may take long,
# which says nothing.
found() {
  local what=$1 log status=0
  log=$(mktemp -p "$build")
  shift
  timeout 600 "$@" >"$log" 2>&1 || status=$?
  if [ "$status" = 0 ]; then echo "NOT FOUND: $what"; return 1; fi
  if [ "$status" = 124 ]; then echo "NOT FOUND IN TIME: $what"; return 1; fi
  echo "found: $what:$(grep -m 1 -E 'failed|emulator' "$log" | sed 's/.*://')"
}

# planted FILE SED-SCRIPT: succeeds if the tests fail with the script applied to the file.
planted() {
  local copy
  copy=$(mktemp -d -p "$build")
  faulty "$copy" "$@" && found "$1: $2" "$copy/kernels" faults
}

# guarded FILE SED-SCRIPT: succeeds if it takes the test for a device to find the fault.
guarded() {
  local copy
  copy=$(mktemp -d -p "$build")
  faulty "$copy" "$@" || return 1
  if ! "$copy/kernels" faults >"$copy/log" 2>&1; then
    cat "$copy/log"
    echo "found without guards: $1: $2"
    return 1
  fi
  found "$1: $2" "$copy/guard" --cases "$guard_cases" --stop
}

# in_perceptrons SED-SCRIPT: succeeds if the tests of perceptron.cu fail with the script applied to it.
in_perceptrons() {
  local copy
  copy=$(mktemp -d -p "$build")
  cp -r "$csrc/core" "$csrc/cuda" "$copy"
  sed -i "$1" "$copy/cuda/perceptron.cu"
  if cmp -s "$copy/cuda/perceptron.cu" "$csrc/cuda/perceptron.cu"; then echo "does not apply: $1"; return 1; fi
  compile -w -O0 -I"$copy" -x c++ -c "$copy/cuda/perceptron.cu" -o "$copy/kernels.o"
  compile "$copy/kernels.o" "$build"/plain_{perceptron_tests,emulator}.o -o "$copy/kernels"
  found "perceptron.cu: $1" "$copy/kernels" faults
}

guard_cases=80
in_parallel '"$build/guard" --cases "$guard_cases"' '"$build/perceptrons"' '"$build/core"' '"$build/small_eigen"' '"$build/arrivals"' \
  '"$build/kernels" float32' '"$build/kernels" float64' '"$build/kernels" float16' '"$build/kernels" bfloat16' \
  '"$build/kernels" other' '"$build/kernels" random 40 1'

faults=('planted member.cuh "s/p.arrivals\[member\] = 0;//"'
  'planted member.cuh "s/if (!scratch().last) return false;//"'
  'planted member.cuh "s/p.counts\[member \* grid.count_blocks + i\]/p.counts[i]/"'
  'planted member.cuh "s/ClassWeights{p.weights + member \* p.classes,/ClassWeights{p.weights,/"'
  'planted cross_entropy.cu "s/member \* p.weight_member_stride + c/c/"'
  'planted cross_entropy.cu "s/gamma\[c\] \* load_as<double>(p.weight/load_as<double>(p.weight/"'
  'planted warp_rows.cuh "s/static_cast<int>(p.rows - first)/static_cast<int>(p.rows - first - 1)/"'
  'planted warp_rows.cuh "s/widen(row\[label\])/widen(row[label - 1])/"'
  # What only rows that are sure of a class show.
  'planted warp_rows.cuh "s/narrow<S>(gradient.at_label)/narrow<S>(gradient.at_label + T(1e-9))/"'
  'planted warp_rows.cuh "s/products.v_top = /products.v_top = 0 * /"'
  'planted long_rows.cuh "s/products{at_top(v), /products{0 * at_top(v), /"'
  'planted long_rows.cuh "s/replace(x, label - begin, gradient.at_label)/replace(x, label - begin, gradient.at_label + 1e-9f)/"'
  'planted long_rows.cuh "s/widen(awaited(picked))/widen(row_of<S>(p.logits, p, member, r)[label.index])/"'
  'planted long_rows.cuh "s/held_places - 1>/held_places>/"'
  'planted long_rows.cuh "s/wait_for_copies<3>/wait_for_copies<4>/"'
  'planted long_rows.cuh "s/wait_for_copies<0>/wait_for_copies<1>/"'
  'planted long_rows.cuh "s/r < p.rows/r + 1 < p.rows/"'
  'planted storage.cuh "s/i + j < size_) first_/i + j <= size_) first_/"'
  # An element behind the losses is written; a row whose label is no class is not.
  'guarded member.cuh "s/static_cast<T\*>(p.loss)\[member\] =/static_cast<T*>(p.loss)[p.members] = &/"'
  'guarded warp_rows.cuh "s/    lanes.fill(row, label.fill<T>());/if (label.index == RowLabel::ignored) &/"')
while IFS=: read -r file line _; do # every single barrier must be missed, and every wait for copies
  faults+=("planted $file ${line}d")
done < <(cd "$csrc/cuda" && {
  grep -nE '__sync(threads|warp)\(\);' ./* | grep -v -e 'no shuffle is a fence' -e perceptron.cu
  grep -Hn 'wait_for_copies' ./warp_rows.cuh
})
faults+=('in_perceptrons "s/if (step == end \&\& !due) break;/if (step == end) break;/"'
  'in_perceptrons "s/member.sums\[i\] = next;/p[i] = next;/"'
  'in_perceptrons "s/end = (slice + 1)/end = slice/"'
  'in_perceptrons "s/std::max(plan.slices, least_slices)/plan.slices/"')
while IFS=: read -r line _; do
  faults+=("in_perceptrons ${line}d")
done < <(grep -nE '__syncthreads\(\);' "$csrc/cuda/perceptron.cu")
in_parallel "${faults[@]}"
