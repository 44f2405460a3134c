// Constants on a device, for their first use inside a capture.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

namespace dynloss::cuda {

namespace {

c10::cuda::CUDAStream stream_outside_of_captures() {
  for (;;) {
    const c10::cuda::CUDAStream stream = c10::cuda::getStreamFromPool();
    cudaStreamCaptureStatus status{};
    C10_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
    if (status == cudaStreamCaptureStatusNone) return stream;
  }
}

// As part of the capture the copy would wait for the device, which is not allowed there, and its result would
// lie in the memory of the graph. On another stream it is made at once, and kept.
at::Tensor place(const at::Tensor& x, const at::Tensor& like) {
  const c10::cuda::CUDAGuard device(like.device());
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  const c10::cuda::CUDAStreamGuard elsewhere(stream_outside_of_captures());
  return x.to(like.device());
}

}  // namespace

TORCH_LIBRARY_IMPL(dynloss, CUDA, library) { library.impl("place", &place); }

}  // namespace dynloss::cuda
