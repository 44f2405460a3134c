// The part of the CUDA runtime that the kernels use, on the host: a .cu file compiles as C++ against it and
// runs on one processor. Every CUDA thread is a fiber that runs until it has to wait for others; who goes on
// then is drawn at random from a seed, so that what only works in one order fails sooner or later. Shared
// memory is an allocation of exactly the requested size, filled with NaN.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum { cudaSharedmemCarveoutMaxShared = 100 };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace emulator {

// What the emulated device has, and the seed of the next launches.
struct Settings {
  uint64_t seed = 1;
  int multiprocessors = 2;
  int capability = 90;
  int max_block_memory = 64 * 1024;
  int resident_blocks = 4;  // run at the same time
};
Settings& settings();

// ---- asked by the thread that is running

unsigned char* block_memory();

void wait_for_block();
void let_others_run();

// Gives `value` (at most 16 bytes) to the other lanes and gets that of lane `source`. `operation` must be the
// same in all lanes.
void exchange(int operation, unsigned mask, const void* value, void* result, size_t size, int source);
int lane();

// To what is there when the thread has waited for it, or at any time before.
void start_copy(void* shared, const void* global, size_t bytes);
void commit_copies();
void wait_for_copies(int groups);

// ---- launching

using Body = void (*)(const void* arguments);
cudaError_t run(const void* kernel, const cudaLaunchConfig_t& config, Body body, const void* arguments);
cudaError_t allow_block_memory(const void* kernel, int bytes);

template <typename T>
T shuffle(int operation, unsigned mask, T value, int source) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16);
  T result;
  exchange(operation, mask, &value, &result, sizeof(T), source);
  return result;
}

}  // namespace emulator

// Of the thread that is running.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

inline void __syncthreads() { emulator::wait_for_block(); }
inline void __threadfence() { emulator::let_others_run(); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulator::shuffle(1, mask, value, emulator::lane() ^ bits);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
  const int source = emulator::lane() + distance;
  return emulator::shuffle(2, mask, value, source < 32 ? source : emulator::lane());
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulator::shuffle(3, mask, value, source % 32);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    votes |= static_cast<unsigned>(emulator::shuffle(4, mask, predicate, lane)) << lane;
  return votes;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::shuffle(5, mask, 0, emulator::lane()); }

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  emulator::let_others_run();
  const unsigned old = *address;
  *address = old + value;
  return old;
}

template <typename T>
T __ldcg(const T* address) {
  return *address;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const emulator::Settings& device = emulator::settings();
  *value = attribute == cudaDevAttrMultiProcessorCount            ? device.multiprocessors
           : attribute == cudaDevAttrComputeCapabilityMajor       ? device.capability / 10
           : attribute == cudaDevAttrComputeCapabilityMinor       ? device.capability % 10
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? device.max_block_memory
                                                                  : device.max_block_memory + 1024;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  return emulator::allow_block_memory(kernel, value);
}

// Launches end before they return, and the device's memory is the host's.
inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = std::malloc(bytes);
  return *memory != nullptr ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "an error of the emulator";
}

template <typename P, typename G>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P, G),
                               const std::type_identity_t<P>& first, const std::type_identity_t<G>& second) {
  struct Arguments {
    void (*kernel)(P, G);
    const P& first;
    const G& second;
  } arguments{kernel, first, second};
  return emulator::run(
      reinterpret_cast<const void*>(kernel), *config,
      [](const void* raw) {
        const auto& x = *static_cast<const Arguments*>(raw);
        x.kernel(x.first, x.second);
      },
      &arguments);
}
