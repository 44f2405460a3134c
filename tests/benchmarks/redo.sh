#!/usr/bin/env bash
# Measures what is committed in tests/benchmarks/results anew and writes it there: bash tests/benchmarks/redo.sh [NAME...], names
# as those of the files, by default all that need no GPU. Needs pip install '.[bench]' and a quiet machine; DATA=DIR is a
# CIFAR-10 folder, without which images are random.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-python}
results=${RESULTS:-tests/benchmarks/results}
data=(${DATA:+--data "$DATA"})
names=(loss_cpu_1_thread loss_cpu_2_threads eigensolvers_cpu eigensolver_grid_cpu products ensembles_cpu vmap_cpu
  basis_sizes_cpu memory_wrn28_10_cpu shard_basis_cpu)

measure() { # measure NAME FILE: its figures into FILE
  case $1 in
    loss_cpu_1_thread) "$python" tests/benchmarks/compare_losses.py --threads 1 --json "$2" ;;
    loss_cpu_2_threads) "$python" tests/benchmarks/compare_losses.py --threads 2 --json "$2" ;;
    eigensolvers_cpu)
      local solvers=("$python" tests/benchmarks/compare_eigensolvers.py)
      "${solvers[@]}" spiral --states 40 --gap 50 --start 3000 --json "$2"
      "${solvers[@]}" myrtle5 "${data[@]}" --dtype float32 --states 2 --gap 5 --start 20 --json "$2"
      "${solvers[@]}" mlp "${data[@]}" --images 512 --width 305 --dtype float32 --states 10 --gap 5 --start 50 --json "$2"
      ;;
    eigensolver_grid_cpu) "$python" tests/benchmarks/compare_eigensolvers.py grid --dtype float32 --gap 10 --json "$2" ;;
    products) "$python" tests/benchmarks/count_products.py --json "$2" ;;
    ensembles_cpu) "$python" tests/benchmarks/compare_ensembles.py --threads 2 --rounds 12 --json "$2" ;;
    vmap_cpu) "$python" tests/benchmarks/compare_vmap.py --json "$2" ;;
    basis_sizes_cpu) "$python" tests/benchmarks/compare_basis_sizes.py --json "$2" ;;
    memory_wrn28_10_cpu) "$python" tests/benchmarks/measure_memory.py --json "$2" ;;
    shard_basis_cpu) "$python" tests/benchmarks/shard_basis.py --json "$2" ;;
    *) echo "expected some of ${names[*]}, not $1" >&2 && return 2 ;;
  esac
}

[ $# -gt 0 ] || set -- "${names[@]}"
for name in "$@"; do
  begin=$(date +%s)
  measure "$name" "$results/$name.json.part" # what is there stays until all of the new is; a grid goes on with its part
  mv "$results/$name.json.part" "$results/$name.json"
  [ "$name" != eigensolver_grid_cpu ] || "$python" docs/tables/measured.py grid "$results/$name.json"
  echo "$name: $(($(date +%s) - begin)) s"
done
