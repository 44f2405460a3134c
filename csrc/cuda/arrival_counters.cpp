// The counters lie in memory that belongs to no allocator: torch hands memory that was taken within a graph's
// pool to the next recording, and a user's pool with everything in it to the user.
//
// Launches on one stream follow each other and share a slice. A captured launch gets a slice for itself,
// since a graph may be replayed beside any stream; graphs do not say when they end, so that it is never given
// back (4 bytes a member). Streams are told by their number, which unlike the handle is never used again, and
// differs between threads for the per-thread stream.
#include "cuda/arrival_counters.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

namespace dynloss::cuda {

namespace {

constexpr int64_t chunk_counters = 1 << 16;
constexpr int64_t sector_counters = 32;  // 128 bytes: streams do not share a cache line

struct Slice {
  unsigned* begin = nullptr;
  int64_t count = 0;
};

// While any thread captures, only a thread in this mode may allocate.
class RelaxedCapture {
 public:
  RelaxedCapture() : status_(cudaThreadExchangeStreamCaptureMode(&mode_)) {}
  RelaxedCapture(const RelaxedCapture&) = delete;
  ~RelaxedCapture() {
    if (status_ == cudaSuccess) cudaThreadExchangeStreamCaptureMode(&mode_);
  }
  cudaError_t status() const { return status_; }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
  cudaError_t status_;
};

// By a stream that nobody captures or waits for.
cudaError_t clear(void* memory, size_t bytes) {
  cudaStream_t stream = nullptr;
  cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(memory, 0, bytes, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  return error;
}

// The zeroed memory of one device.
class Arena {
 public:
  cudaError_t take(int64_t count, Slice* slice) {
    count = (count + sector_counters - 1) / sector_counters * sector_counters;
    if (count > free_.count) {
      if (const cudaError_t error = grow(std::max(count, chunk_counters)); error != cudaSuccess) return error;
    }
    *slice = {free_.begin, count};
    free_ = {free_.begin + count, free_.count - count};
    return cudaSuccess;
  }

 private:
  cudaError_t grow(int64_t count) {
    const RelaxedCapture relaxed;
    if (relaxed.status() != cudaSuccess) return relaxed.status();
    void* memory = nullptr;
    cudaError_t error = cudaMalloc(&memory, count * sizeof(unsigned));
    if (error != cudaSuccess) return error;
    error = clear(memory, count * sizeof(unsigned));
    if (error != cudaSuccess) {
      cudaFree(memory);
      return error;
    }
    free_ = {static_cast<unsigned*>(memory), count};
    return cudaSuccess;
  }

  Slice free_;
};

struct Counters {
  std::mutex mutex;
  std::map<int, Arena> arenas;                                    // by device
  std::map<std::pair<int, unsigned long long>, Slice> of_stream;  // by device and number of the stream
};

}  // namespace

cudaError_t arrival_counters(int64_t count, cudaStream_t stream, unsigned** counters) {
  static auto& all = *new Counters();  // never destroyed: at exit the driver may be gone before
  int device = 0;
  cudaStreamCaptureStatus status{};
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaStreamIsCapturing(stream, &status);
  unsigned long long number = 0;
  const bool captured = status != cudaStreamCaptureStatusNone;
  if (error == cudaSuccess && !captured) error = cudaStreamGetId(stream, &number);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(all.mutex);
  Slice own;
  Slice& slice = captured ? own : all.of_stream[{device, number}];
  // A slice that has become too small may still be in use, and is left.
  if (slice.count < count) error = all.arenas[device].take(count, &slice);
  *counters = slice.begin;
  return error;
}

}  // namespace dynloss::cuda
