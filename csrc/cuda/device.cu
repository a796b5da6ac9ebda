// What the driver says of a device.
#include "device.h"

int masked_ops_cuda_device_facts(int device, masked_ops::cuda::DeviceFacts* facts) {
  int l2 = 0, shared = 0;
  const struct {
    cudaDeviceAttr attribute;
    int* to;
  } wanted[] = {{cudaDevAttrComputeCapabilityMajor, &facts->major},
                {cudaDevAttrComputeCapabilityMinor, &facts->minor},
                {cudaDevAttrMultiProcessorCount, &facts->multiprocessors},
                {cudaDevAttrL2CacheSize, &l2},
                {cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared}};
  for (const auto& fact : wanted) {
    if (const cudaError_t error = cudaDeviceGetAttribute(fact.to, fact.attribute, device)) return error;
  }
  facts->l2_bytes = l2;
  facts->shared_bytes = shared;
  return 0;
}

const char* masked_ops_cuda_error_string(int error) {
  if (error == masked_ops::cuda::kUnsupported) return "not served by this kernel";
  return cudaGetErrorString(cudaError_t(error));
}
