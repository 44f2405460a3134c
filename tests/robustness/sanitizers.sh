#!/usr/bin/env bash
# The CPU code under sanitizers: bash tests/robustness/sanitizers.sh [kernels] [address] [thread], by default all.
# Needs $PYTHON (default python3) with torch, ninja, setuptools and the test packages, and g++ (or $CXX). The extension is built in
# a temporary folder, or in $SANITIZED, where it stays for the next time: 5 minutes a build on two cores.
#
# kernels: kernel_bounds.cpp, which needs little of torch: AddressSanitizer and UndefinedBehaviorSanitizer on arrays that end where they
#   must, for every instruction set that this machine has. Last with arrays that are too short, which must be found.
# address: the tests with the whole extension under both: they see what it does, and memory of others that it touches; and with
#   the assertions of what it includes, such as pybind11's that the GIL is held. Not seen:
#   what torch does by itself, and leaks (Python and torch keep much until the process ends; test_memory.py looks at those).
# thread: ThreadSanitizer on eight threads of Python, each with its own op calls, operators and trackers; and on the parallel loops
#   of all kernels, whose threads gomp_threads.cpp makes in libgomp's place, which is not instrumented: its barriers would not be
#   seen. A race on purpose has to be found. What happens inside of torch is not checked. See thread.supp.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=$PWD/tests/robustness
python=$(command -v "${PYTHON:-python3}")

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export OMP_NUM_THREADS=1 DYNLOSS_EXT_CUDA=0

# With these for the unrolled kernels, which with every check in line take GCC more than ten minutes each; what they leave out is
# checked by run_kernels for those of the loss.
unrolled=
built() { # built NAME FLAGS...: the extension with these flags in $folder
  folder=${SANITIZED:-$scratch}/$1
  mkdir -p "$folder"
  git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- --create | tar --directory="$folder" --extract
  sed -i 's/"-g0"/"-g1"/' "$folder/setup.py" # a report names lines
  printf '#!/bin/sh\ncase "$*" in *csrc/cpu/perceptron_*|*csrc/cpu/rows_*) set -- "$@" -O1 %s ;; esac\nexec %s "$@"\n' \
    "$unrolled" "${CXX:-g++}" >"$folder/compiler"
  chmod +x "$folder/compiler"
  (cd "$folder" && CFLAGS="${*:2}" LDFLAGS="${*:2}" CXX="$folder/compiler" PATH="$(dirname "$python"):$PATH" \
    nice "$python" setup.py -q build_ext --inplace)
}

also= # ":LIBRARY" that is loaded, too
preloaded() { # preloaded RUNTIME COMMAND...: libstdc++ too, or the runtime does not find what throws
  local runtime libstdcxx
  runtime=$("${CXX:-g++}" -print-file-name="$1")
  libstdcxx=$("${CXX:-g++}" -print-file-name=libstdc++.so.6)
  (cd "$folder" && env LD_PRELOAD="$runtime:$libstdcxx$also" PYTHONPATH="$folder" PYTHONMALLOC=malloc "${@:2}")
}

run_kernels() {
  local checked=(-std=c++20 -O1 -g1 -fno-strict-aliasing -fopenmp -Wall -Wextra -Wno-psabi -fsanitize=address,undefined
    -fno-sanitize-recover=all -Icsrc) torch source
  torch=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent)')
  for source in tests/robustness/kernel_bounds csrc/lanczos/small_eigen csrc/cpu/rows_{default,avx2,avx512}; do
    nice "${CXX:-g++}" "${checked[@]}" -isystem "$torch/include" -c "$source.cpp" -o "$scratch/$(basename "$source").o"
  done
  "${CXX:-g++}" "${checked[@]}" "$scratch"/*.o -L"$torch/lib" -lc10 -Wl,-rpath,"$torch/lib" -o "$scratch/kernel_bounds"
  export ASAN_OPTIONS=detect_leaks=0
  timeout 900 "$scratch/kernel_bounds"
  if timeout 900 "$scratch/kernel_bounds" 1 2>"$scratch/report"; then echo 'NOT FOUND: arrays too short'; return 1; fi
  grep -m 1 'heap-buffer-overflow' "$scratch/report"
}

run_address() {
  # What is instrumented is not vectorised, and rounds otherwise: of these the digits are those of vectors.
  local vectorised=(eigsh.py::test_the_driver_runs_the_instruction_set_that_is_asked_for
    spectrum.py::test_trace_of_a_long_float32_vector_loses_no_digits
    spectrum.py::test_trace_leaves_nothing_of_the_basis_in_the_probes)
  # vptr asks for type information that torch hides.
  local unrolled='-fno-sanitize=null,alignment,object-size -fno-sanitize-address-use-after-scope'
  unrolled+=' --param asan-instrumentation-with-call-threshold=100'
  built address -UNDEBUG -fsanitize=address,undefined -fno-sanitize=vptr -fno-omit-frame-pointer
  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=1 \
    UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
    preloaded libasan.so timeout 5400 "$python" -m pytest -q -p no:cacheprovider -m 'not slow and not cuda' \
    "${vectorised[@]/#/--deselect=tests/test_}" \
    tests/test_{cross_entropy,cross_entropy_autograd,cross_entropy_weight,cross_entropy_probabilities,confident_rows}.py \
    tests/test_{oscillation,eager,perceptron,perceptron_ensemble,operators,hessian,eigsh,audits,symmetry,tracker,spectrum}.py \
    tests/test_{double_backward,operator_algebra,graphs,levels,from_gradients,inplace_gradient,fingerprint,ntk}.py
}

run_thread() {
  built thread -fsanitize=thread -fno-omit-frame-pointer
  local also=
  export TSAN_OPTIONS="suppressions=$here/thread.supp:halt_on_error=1:second_deadlock_stack=1:ignore_noninstrumented_modules=1"
  preloaded libtsan.so timeout 900 "$python" "$here/eight_threads.py"
  "${CXX:-g++}" -std=c++20 -O1 -g1 -Wall -Wextra -fsanitize=thread -shared -fPIC "$here/gomp_threads.cpp" -o "$folder/gomp_threads.so"
  also=:$folder/gomp_threads.so
  preloaded libtsan.so timeout 900 "$python" "$here/parallel_loops.py"
  if preloaded libtsan.so timeout 900 "$python" "$here/parallel_loops.py" race 2>"$scratch/report"; then
    echo 'NOT FOUND: a race on purpose'
    return 1
  fi
  grep -m 1 'data race' "$scratch/report"
}

[ $# -gt 0 ] || set -- kernels address thread
for name in "$@"; do
  [ "$(type -t "run_$name")" = function ] || { echo "expected kernels, address or thread, not $name" >&2; exit 2; }
done
for name in "$@"; do
  echo "=== $name"
  "run_$name"
done
