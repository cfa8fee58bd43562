#include "launch.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace divnorm::cuda {
namespace {

constexpr int kFirstWithClusters = 9;  // compute capability

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // it has been reported
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
}

// What a device answers that cannot hold a cluster: partitioned ones and new ones differ in it.
bool refuses(cudaError_t status) {
  return status == cudaErrorInvalidClusterSize || status == cudaErrorInvalidConfiguration ||
         status == cudaErrorInvalidValue || status == cudaErrorNotSupported || status == cudaErrorLaunchOutOfResources;
}

// Makes a device current for as long as this lives. with_context: its context too, as the driver's own functions want
// it, which a thread that has launched nothing yet is without.
class Current {
 public:
  explicit Current(int device, bool with_context = false) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ == device && !with_context) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = before_ != device;
  }
  ~Current() {
    if (changed_) cudaSetDevice(before_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// A launch as the runtime takes it.
class Config {
 public:
  Config(const Launch& launch, Stream stream) {
    config_.gridDim = dim3(static_cast<unsigned>(launch.blocks));
    config_.blockDim = dim3(static_cast<unsigned>(launch.threads));
    config_.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
    config_.stream = reinterpret_cast<cudaStream_t>(stream.handle);
    config_.attrs = attributes_;
    if (launch.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
    }
    if (launch.early) {
      cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
  }
  Config(const Config&) = delete;
  Config& operator=(const Config&) = delete;
  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchAttribute attributes_[2] = {};
  cudaLaunchConfig_t config_ = {};
};

void start(const Launch& launch, Stream stream, const void* kernel, const void* arguments) {
  const Current current(stream.device);
  void* all[] = {const_cast<void*>(arguments)};
  check(cudaLaunchKernelExC(Config(launch, stream).get(), kernel, all), "cudaLaunchKernelExC");
}

// The same for every plan: these belong to the kernel, and another plan may be at work.
void prepare(int device, int most_shared_bytes, const void* function) {
  const Current current(device);
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_bytes),
        "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
  check(cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "cudaFuncSetAttribute(PreferredSharedMemoryCarveout)");
}

// The driver's function is asked for at run time, so that the module loads where there is no driver.
constexpr const char* kEncoder = "cuTensorMapEncodeTiled";
[[maybe_unused]] constexpr unsigned kEncoderSince = 12000;

decltype(&cuTensorMapEncodeTiled) encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION < 12050  // which has only the older of the two
  check(cudaGetDriverEntryPoint(kEncoder, &found, cudaEnableDefault, &result), "cudaGetDriverEntryPoint");
#else
  check(cudaGetDriverEntryPointByVersion(kEncoder, &found, kEncoderSince, cudaEnableDefault, &result),
        "cudaGetDriverEntryPointByVersion");
#endif
  if (result != cudaDriverEntryPointSuccess) throw std::runtime_error(std::string("the driver has no ") + kEncoder);
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

}  // namespace

Versions versions() {
  Versions found;
  check(cudaDriverGetVersion(&found.driver), "cudaDriverGetVersion");
  check(cudaRuntimeGetVersion(&found.runtime), "cudaRuntimeGetVersion");
  return found;
}

TensorMap described(int device, const BoxedTensor& tensor) {
  const Current current(device, true);
  static const auto encode = encoder();
  const auto words = [](int64_t bytes) { return static_cast<cuuint64_t>(bytes / kBoxWord); };
  const cuuint64_t extents[] = {words(tensor.pitch), static_cast<cuuint64_t>(tensor.rows)};
  const cuuint64_t pitch = static_cast<cuuint64_t>(tensor.pitch);
  const cuuint32_t box[] = {static_cast<cuuint32_t>(words(tensor.box.row_bytes)),
                            static_cast<cuuint32_t>(tensor.box.rows)};
  const cuuint32_t steps[] = {1, 1};
  TensorMap map;
  static_assert(sizeof map == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
  const CUresult status =
      encode(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_UINT64, 2, const_cast<void*>(tensor.first),
             extents, &pitch, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error(std::string(kEncoder) + ": driver error " + std::to_string(status));
  return map;
}

void prepare(int device, int most_shared_bytes, Kernel kernel) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  prepare(device, most_shared_bytes, function);
  const Current current(device);
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  if (major >= kFirstWithClusters)
    check(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cudaFuncSetAttribute(NonPortableClusterSizeAllowed)");
}
void prepare(int device, int most_shared_bytes, ChannelKernel kernel) {
  prepare(device, most_shared_bytes, reinterpret_cast<const void*>(kernel));
}

int64_t clusters_at_once(int device, const Launch& launch, Kernel kernel) {
  const Current current(device);
  const auto* function = reinterpret_cast<const void*>(kernel);
  int clusters = 0;
  if (launch.cluster > 1) {
    const cudaError_t status = cudaOccupancyMaxActiveClusters(&clusters, function, Config(launch, {device, 0}).get());
    if (refuses(status)) {
      cudaGetLastError();  // an answer, not a failure
      return 0;
    }
    check(status, "cudaOccupancyMaxActiveClusters");
    return clusters;
  }
  int blocks = 0, multiprocessors = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, launch.threads,
                                                      static_cast<size_t>(launch.shared_bytes)),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return int64_t{blocks} * multiprocessors;
}

void start(const Launch& launch, Stream stream, Kernel kernel, const Arguments& arguments) {
  start(launch, stream, reinterpret_cast<const void*>(kernel), &arguments);
}
void start(const Launch& launch, Stream stream, FinishKernel kernel, const FinishArguments& arguments) {
  start(launch, stream, reinterpret_cast<const void*>(kernel), &arguments);
}
void start(const Launch& launch, Stream stream, ClearKernel kernel, const ClearArguments& arguments) {
  start(launch, stream, reinterpret_cast<const void*>(kernel), &arguments);
}
void start(const Launch& launch, Stream stream, ChannelKernel kernel, const ChannelArguments& arguments) {
  start(launch, stream, reinterpret_cast<const void*>(kernel), &arguments);
}

}  // namespace divnorm::cuda
