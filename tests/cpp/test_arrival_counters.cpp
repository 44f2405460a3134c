// Whose counters are whose: csrc/cuda/arrival_counters.cpp against a device that is played here. It has the
// rules that matter: while anybody captures, only a thread in relaxed mode may allocate or wait; memory comes
// dirty.
#include "cuda/arrival_counters.h"

#include <cstdlib>
#include <cstring>
#include <set>
#include <thread>
#include <vector>

#include "check.h"
#include "cuda_runtime.h"

struct CUstream_st {
  unsigned long long number;
  bool capturing = false;
  void* dirty = nullptr;  // being cleared
};

namespace {

int device = 0;
bool anybody_captures = false, out_of_memory = false;
unsigned long long streams_made = 100;
std::set<void*> allocations;
thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
CUstream_st per_thread{0};  // one handle, a stream per thread

bool unsafe() { return anybody_captures && mode != cudaStreamCaptureModeRelaxed; }

unsigned* take(int64_t count, CUstream_st& stream) {
  unsigned* counters = nullptr;
  CHECK(dynloss::cuda::arrival_counters(count, &stream, &counters) == cudaSuccess);
  for (int64_t i = 0; i < count; ++i) CHECK(counters[i] == 0);
  CHECK(mode == cudaStreamCaptureModeGlobal);
  return counters;
}

bool apart(const unsigned* x, int64_t x_count, const unsigned* y, int64_t y_count) {
  return x + x_count <= y || y + y_count <= x;
}

void test_streams() {
  context = "streams";
  CUstream_st first{1}, second{2};
  unsigned* own = take(3, first);
  CHECK(take(3, first) == own);
  CHECK(take(1, first) == own);
  CHECK(apart(own, 3, take(3, second), 3));
  // A launch with more members gets more; the smaller slice may still be counting.
  own[0] = 1;
  unsigned* more = take(100000, first);
  CHECK(apart(own, 3, more, 100000));
  CHECK(take(100000, first) == more);
  own[0] = 0;
  // Another stream at the same address, as after cudaStreamDestroy.
  first.number = 3;
  CHECK(apart(more, 100000, take(3, first), 3));
}

void test_threads() {
  context = "per-thread stream";
  std::set<unsigned*> seen;
  for (int i = 0; i < 3; ++i) std::thread([&] { seen.insert(take(1, per_thread)); }).join();
  CHECK(seen.size() == 3);
}

void test_devices() {
  context = "devices";
  CUstream_st stream{7};
  unsigned* own = take(5, stream);
  device = 1;
  CHECK(apart(own, 5, take(5, stream), 5));
  device = 0;
  CHECK(take(5, stream) == own);
}

// Every captured launch its own, also where the memory for it has to be allocated during the capture.
void test_captures() {
  context = "captures";
  CUstream_st stream{8};
  unsigned* eager = take(9, stream);
  stream.capturing = anybody_captures = true;
  std::vector<unsigned*> nodes;
  for (int i = 0; i < 3000; ++i) nodes.push_back(take(40, stream));
  stream.capturing = anybody_captures = false;
  std::set<unsigned*> different(nodes.begin(), nodes.end());
  CHECK(different.size() == nodes.size());
  unsigned* last = nullptr;
  for (unsigned* node : different) {
    CHECK(apart(eager, 9, node, 40));
    if (last != nullptr) CHECK(apart(last, 40, node, 40));
    last = node;
  }
  CHECK(take(9, stream) == eager);
  // Somebody else's capture.
  CUstream_st other{9};
  anybody_captures = true;
  take(1 << 20, other);
  anybody_captures = false;
}

void test_failure() {
  context = "out of memory";
  CUstream_st stream{10};
  unsigned* counters = nullptr;
  out_of_memory = true;
  CHECK(dynloss::cuda::arrival_counters(1 << 21, &stream, &counters) == cudaErrorMemoryAllocation);
  out_of_memory = false;
  take(1 << 21, stream);
}

}  // namespace

cudaError_t cudaGetDevice(int* result) { return *result = device, cudaSuccess; }
cudaError_t cudaMalloc(void** memory, size_t bytes) {
  if (unsafe()) return cudaErrorStreamCaptureUnsupported;
  if (out_of_memory) return cudaErrorMemoryAllocation;
  allocations.insert(*memory = std::malloc(bytes));
  std::memset(*memory, 0x5a, bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  allocations.erase(memory);
  return std::free(memory), cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  CHECK(!stream->capturing);  // it would become a node of the graph
  std::memset(memory, value, bytes);
  stream->dirty = memory;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  CHECK(flags == cudaStreamNonBlocking);
  *stream = new CUstream_st{++streams_made};
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  CHECK(stream->dirty == nullptr);  // somebody has waited for the zeros
  return delete stream, cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (unsafe()) return cudaErrorStreamCaptureUnsupported;
  return stream->dirty = nullptr, cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* number) {
  thread_local const unsigned long long of_this_thread = ++streams_made;
  *number = stream == &per_thread ? of_this_thread : stream->number;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) {
  std::swap(*other, mode);
  return cudaSuccess;
}

int main() {
  test_streams();
  test_threads();
  test_devices();
  test_captures();
  test_failure();
  for (void* memory : allocations) std::free(memory);  // the arena gives none back
  return finish("arrival counters");
}
