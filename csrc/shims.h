// What kernels of torch's dispatcher ask of torch, by its C functions alone: no header of torch's, one binary for all
// of its versions, and no GIL. They are declared in torch/csrc/inductor/aoti_torch/c/shim.h and
// torch/csrc/stable/c/shim.h.
#pragma once

#include <array>
#include <string_view>
#include <vector>

#include "torch_api.h"

namespace divnorm::shims {

using torch::View;

struct Opaque;
using Handle = Opaque*;  // of a tensor, a string, a list or a library of torch's
using Value = uint64_t;  // an argument or a result: a number as it is, all else by its handle
// Finds its arguments on the stack, which are its own, and leaves its results there.
using Kernel = void (*)(Value* stack, uint64_t arguments, uint64_t results);

// Looks torch up among what `loaded`, a shared library, has brought into the process. False where a function is
// missing: nothing below may be called then.
bool connect(const char* loaded);

// Makes a kernel that of an operator ("forward") for a dispatch key ("CPU"), for good. False where torch refuses.
bool implement(const char* key, const char* name, Kernel kernel);

// Calls an operator ("namespace::name"), which takes the arguments off the stack. False where it failed.
bool call(const char* operator_name, Value* stack);

enum class Kind { number, tensor, text, list };

// An argument as an operator's schema declares it.
struct Slot {
  Kind kind;
  bool optional = false;
};

inline Handle handle(Value value) { return reinterpret_cast<Handle>(value); }
// What an optional argument holds, which is there.
inline Value held(Value value) { return *reinterpret_cast<const Value*>(value); }
double real(Value value);
std::string_view text(Value value);
std::vector<Value> list(Value value);

// Frees what a kernel's argument holds.
void release(Value value, Slot slot);

// As torch::view_of, of a tensor that the dispatcher handed out: views that negate and the like are resolved by then.
bool view_of(Handle tensor, View& view);

// The number by which torch calls a dtype.
int32_t code_of(Dtype dtype);

int threads();

// A tensor of the CPU's that is being made; what fails throws.
class Tensor {
 public:
  Tensor() = default;
  Tensor(int64_t dims, const int64_t* sizes, const int64_t* strides, Dtype dtype);
  // Without gaps.
  Tensor(const std::vector<int64_t>& sizes, Dtype dtype);
  // As `like` lies in memory.
  explicit Tensor(const View& like) : Tensor(like.raw.ndim, like.raw.shape, like.raw.strides, like.dtype) {}
  Tensor(Tensor&& other) noexcept : handle_(other.handed_on()) {}
  Tensor& operator=(Tensor&& other) noexcept;
  ~Tensor();

  void* data() const;
  Handle handed_on() {
    const Handle handle = handle_;
    handle_ = nullptr;
    return handle;
  }

 private:
  Handle handle_ = nullptr;
};

}  // namespace divnorm::shims
