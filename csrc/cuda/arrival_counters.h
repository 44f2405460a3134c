// Where the blocks of a launch count who has arrived.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dynloss::cuda {

// `count` counters on the current device for one launch on `stream`, or for one node of the graph that it
// captures. They are zero when the launch begins, and the launch leaves them zero.
cudaError_t arrival_counters(int64_t count, cudaStream_t stream, unsigned** counters);

}  // namespace dynloss::cuda
