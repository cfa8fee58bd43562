// All kernels of a dtype; included by the kernels_*.cu alone.
#pragma once

#include "clear.h"
#include "finish.h"
#include "kernels.h"
#include "resident.h"
#include "staged.h"

namespace divnorm::cuda {

template <class T>
KernelSet instantiated() {
  return {{resident_forward<T, false>, resident_forward<T, true>},
          {resident_backward<T, false>, resident_backward<T, true>},
          {staged_forward<T, false>, staged_forward<T, true>},
          {staged_backward<T, false>, staged_backward<T, true>},
          finish<Acc<T>>,
          clear<T>};
}

}  // namespace divnorm::cuda
