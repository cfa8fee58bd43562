#include "shims.h"

#include <cstring>
#include <stdexcept>

#if __has_include(<dlfcn.h>)
#include <dlfcn.h>
#endif

namespace divnorm::shims {
namespace {

using Error = int32_t;  // 0: none

constexpr uint64_t version(uint64_t major, uint64_t minor) { return major << 56 | minor << 48; }

struct Functions {
  Error (*library)(const char* name, const char* key, const char* file, uint32_t line, Handle* made);
  Error (*implement)(Handle library, const char* name, Kernel kernel, uint64_t conventions);
  Error (*call)(const char* name, const char* overload, Value* stack, uint64_t conventions);
  Error (*text_length)(Handle text, size_t* length);
  Error (*text)(Handle text, const char** data);
  Error (*delete_text)(Handle text);
  Error (*list_size)(Handle list, size_t* size);
  Error (*list_item)(Handle list, size_t index, Value* item);
  Error (*delete_list)(Handle list);
  Error (*delete_cell)(Value* cell);  // from 2.13 on; before, cells are C++'s own to delete
  Error (*dims)(Handle tensor, int64_t* dims);
  Error (*sizes)(Handle tensor, int64_t** sizes);
  Error (*strides)(Handle tensor, int64_t** strides);
  Error (*dtype)(Handle tensor, int32_t* dtype);
  Error (*layout)(Handle tensor, int32_t* layout);
  Error (*device)(Handle tensor, int32_t* type);
  Error (*storage_bytes)(Handle tensor, int64_t* bytes);
  Error (*storage_offset)(Handle tensor, int64_t* offset);
  Error (*data_to_read)(Handle tensor, const void** data);
  Error (*data_to_write)(Handle tensor, void** data);
  Error (*empty)(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device_type,
                 int32_t device, Handle* made);
  Error (*delete_tensor)(Handle tensor);
  Error (*threads)(uint32_t* count);
  int32_t (*cpu)();
  int32_t (*strided)();
  int32_t (*float64)();
  int32_t (*float32)();
  int32_t (*bfloat16)();
  int32_t (*float16)();
};

Functions functions;
uint64_t conventions;  // those of the version of torch's whose functions are used
int32_t cpu, strided;
std::array<int32_t, 4> codes;  // of dtypes, as Dtype numbers them

template <class Function>
bool find(void* library, const char* name, Function& function) {
#if __has_include(<dlfcn.h>)
  function = reinterpret_cast<Function>(dlsym(library, name));
#endif
  return function != nullptr;
}

bool find_all(void* in) {
  Functions& f = functions;
  conventions = find(in, "torch_delete_stable_ivalue", f.delete_cell) ? version(2, 13) : version(2, 10);
  return find(in, "aoti_torch_library_init_impl", f.library) && find(in, "torch_library_impl", f.implement) &&
         find(in, "torch_call_dispatcher", f.call) && find(in, "torch_string_length", f.text_length) &&
         find(in, "torch_string_c_str", f.text) && find(in, "torch_delete_string", f.delete_text) &&
         find(in, "torch_list_size", f.list_size) && find(in, "torch_list_get_item", f.list_item) &&
         find(in, "torch_delete_list", f.delete_list) && find(in, "aoti_torch_get_dim", f.dims) &&
         find(in, "aoti_torch_get_sizes", f.sizes) && find(in, "aoti_torch_get_strides", f.strides) &&
         find(in, "aoti_torch_get_dtype", f.dtype) && find(in, "aoti_torch_get_layout", f.layout) &&
         find(in, "aoti_torch_get_device_type", f.device) && find(in, "aoti_torch_get_storage_size", f.storage_bytes) &&
         find(in, "aoti_torch_get_storage_offset", f.storage_offset) &&
         find(in, "torch_get_const_data_ptr", f.data_to_read) &&
         find(in, "torch_get_mutable_data_ptr", f.data_to_write) && find(in, "aoti_torch_empty_strided", f.empty) &&
         find(in, "aoti_torch_delete_tensor_object", f.delete_tensor) && find(in, "torch_get_num_threads", f.threads) &&
         find(in, "aoti_torch_device_type_cpu", f.cpu) && find(in, "aoti_torch_layout_strided", f.strided) &&
         find(in, "aoti_torch_dtype_float64", f.float64) && find(in, "aoti_torch_dtype_float32", f.float32) &&
         find(in, "aoti_torch_dtype_bfloat16", f.bfloat16) && find(in, "aoti_torch_dtype_float16", f.float16);
}

void check(Error error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string("torch failed: ") + what);
}

bool known_dtype(int32_t code, Dtype& dtype) {
  for (size_t i = 0; i < codes.size(); ++i) {
    if (codes[i] != code) continue;
    dtype = static_cast<Dtype>(i);
    return true;
  }
  return false;
}

std::vector<int64_t> strides_of(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides[d] = stride;
  return strides;
}

}  // namespace

bool connect(const char* loaded) {
#if __has_include(<dlfcn.h>)
  void* library = dlopen(loaded, RTLD_LAZY | RTLD_NOLOAD);  // and never let go of
  if (library == nullptr || !find_all(library)) return false;
  cpu = functions.cpu();
  strided = functions.strided();
  codes = {functions.float64(), functions.float32(), functions.bfloat16(), functions.float16()};
  return true;
#else
  static_cast<void>(loaded);
  return false;
#endif
}

bool implement(const char* key, const char* name, Kernel kernel) {
  Handle library;  // is kept: with it go its kernels
  return functions.library("divnorm_kernels", key, "csrc/shims.cpp", 0, &library) == 0 &&
         functions.implement(library, name, kernel, conventions) == 0;
}

bool call(const char* operator_name, Value* stack) {
  return functions.call(operator_name, "", stack, conventions) == 0;
}

double real(Value value) {
  double number;
  std::memcpy(&number, &value, sizeof number);
  return number;
}

std::string_view text(Value value) {
  const char* data;
  size_t length;
  check(functions.text(handle(value), &data), "torch_string_c_str");
  check(functions.text_length(handle(value), &length), "torch_string_length");
  return {data, length};
}

std::vector<Value> list(Value value) {
  size_t size;
  check(functions.list_size(handle(value), &size), "torch_list_size");
  std::vector<Value> items(size);
  for (size_t i = 0; i < size; ++i) check(functions.list_item(handle(value), i, &items[i]), "torch_list_get_item");
  return items;
}

void release(Value value, Slot slot) {
  if (slot.optional) {
    if (value == 0) return;
    auto* cell = reinterpret_cast<Value*>(value);
    release(*cell, {slot.kind});
    if (functions.delete_cell != nullptr)
      functions.delete_cell(cell);
    else
      delete cell;
  } else if (slot.kind == Kind::tensor) {
    functions.delete_tensor(handle(value));
  } else if (slot.kind == Kind::text) {
    functions.delete_text(handle(value));
  } else if (slot.kind == Kind::list) {
    functions.delete_list(handle(value));
  }
}

bool view_of(Handle tensor, View& view) {
  const Functions& f = functions;
  int32_t layout, device, dtype;
  if (f.layout(tensor, &layout) != 0 || layout != strided) return false;
  if (f.device(tensor, &device) != 0 || device != cpu) return false;
  if (f.dtype(tensor, &dtype) != 0 || !known_dtype(dtype, view.dtype)) return false;
  int64_t dims, offset, bytes;
  if (f.dims(tensor, &dims) != 0 || dims > torch::kMostDims) return false;
  view.raw = {};
  view.raw.device = {kDLCPU, 0};
  view.raw.ndim = static_cast<int32_t>(dims);
  if (f.sizes(tensor, &view.raw.shape) != 0 || f.strides(tensor, &view.raw.strides) != 0) return false;
  view.numel = 1;
  for (int64_t d = 0; d < dims; ++d) view.numel *= view.raw.shape[d];
  // where nothing lies between the numbers, the last of them is the numel-th
  if (!view.contiguous() && !view.channels_last()) return false;
  if (f.storage_offset(tensor, &offset) != 0 || f.storage_bytes(tensor, &bytes) != 0) return false;
  if ((offset + view.numel) * bytes_of(view.dtype) > bytes) return false;
  const void* data;
  if (f.data_to_read(tensor, &data) != 0) return false;
  view.raw.data = const_cast<void*>(data);
  view.given = data != nullptr || view.numel == 0;
  return view.given;
}

int32_t code_of(Dtype dtype) { return codes[static_cast<size_t>(dtype)]; }

int threads() {
  uint32_t count;
  check(functions.threads(&count), "torch_get_num_threads");
  return static_cast<int>(count);
}

Tensor::Tensor(int64_t dims, const int64_t* sizes, const int64_t* strides, Dtype dtype) {
  check(functions.empty(dims, sizes, strides, code_of(dtype), cpu, 0, &handle_), "aoti_torch_empty_strided");
}

Tensor::Tensor(const std::vector<int64_t>& sizes, Dtype dtype)
    : Tensor(static_cast<int64_t>(sizes.size()), sizes.data(), strides_of(sizes).data(), dtype) {}

Tensor& Tensor::operator=(Tensor&& other) noexcept {
  std::swap(handle_, other.handle_);
  return *this;
}

Tensor::~Tensor() {
  if (handle_ != nullptr) functions.delete_tensor(handle_);
}

void* Tensor::data() const {
  void* data;
  check(functions.data_to_write(handle_, &data), "torch_get_mutable_data_ptr");
  return data;
}

}  // namespace divnorm::shims
