// The interface between the cross-entropy op on CPU and its kernels, which are compiled once per instruction
// set.
#pragma once

#include <cstdint>

#include "core/storage.h"

namespace dynloss::cpu {

enum class Kind { loss, loss_and_gradient, gradient, hessian, third };

// A tensor seen as blocks of rows of classes; strides in elements.
struct Operand {
  void* data = nullptr;
  int64_t block_stride = 0;
  int64_t row_stride = 0;
  int64_t class_stride = 0;
};

// Beyond this many classes a row is processed by itself, along the classes, instead of many rows side by
// side.
constexpr int64_t max_tile_classes = 32;
constexpr int64_t max_plane_classes =
    256;  // where rows are neighbours in memory and loads need no transposition

// One block: all its rows share their class weights. Either class_stride (rows) or row_stride (planes) of
// every operand is 1.
struct Block {
  Kind kind;
  Storage storage;
  int64_t num_classes;
  Operand logits, u, v, out;
  const int64_t* labels;  // one per row
  int64_t ignore_index;
  bool any_ignored;
  const double* weights;  // (C,)
  double weights_sum;
  double label_smoothing;
  double scale;           // multiplies gradient, Hessian·v and third·u·v of every row
  const void* row_scale;  // and this of each, or null; float, or double for float64 storage
  void* row_loss;         // per row, in the storage type, or null
  bool into_logits;       // `out` is `logits` itself
};

// Rows [begin, end) of the block: writes `out` and `row_loss`, returns the sum of the losses.
using RunRows = double (*)(const Block& block, int64_t begin, int64_t end);

// How many labels are not to be ignored, and whether all of those are classes.
struct LabelCount {
  int64_t counted;
  bool valid;
};
using CountLabels = LabelCount (*)(const int64_t* labels, int64_t rows, int64_t num_classes,
                                   int64_t ignore_index);

// What is compiled once per instruction set.
struct Kernels {
  const char* instruction_set;
  RunRows run_rows;
  CountLabels count_labels;
};

extern const Kernels default_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels;
#endif

}  // namespace dynloss::cpu
