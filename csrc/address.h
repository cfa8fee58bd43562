// Memory as Python tells it to the module's functions.
#pragma once

#include <cstdint>

namespace divnorm {

using Address = uintptr_t;  // 0: absent

inline const void* read(Address address) { return reinterpret_cast<const void*>(address); }
inline void* written(Address address) { return reinterpret_cast<void*>(address); }

}  // namespace divnorm
