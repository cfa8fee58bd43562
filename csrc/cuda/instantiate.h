// All kernels of a dtype; included by the kernels_*.cu alone.
#pragma once

#include "clear.h"
#include "finish.h"
#include "kernels.h"
#include "pipeline.h"
#include "resident.h"
#include "seam_sums.h"
#include "staged.h"

namespace divnorm::cuda {

template <class T>
KernelSet instantiated() {
  constexpr Form plain = Form::plain, general = Form::general;
  return {{{pipelined_forward<T, false, plain>, pipelined_forward<T, true, plain>},
           {pipelined_forward<T, false, general>, pipelined_forward<T, true, general>}},
          {{pipelined_backward<T, false, plain>, pipelined_backward<T, true, plain>},
           {pipelined_backward<T, false, general>, pipelined_backward<T, true, general>}},
          {{resident_forward<T, false, plain>, resident_forward<T, true, plain>},
           {resident_forward<T, false, general>, resident_forward<T, true, general>}},
          {{resident_backward<T, false, plain>, resident_backward<T, true, plain>},
           {resident_backward<T, false, general>, resident_backward<T, true, general>}},
          {{staged_forward<T, false, plain>, staged_forward<T, true, plain>},
           {staged_forward<T, false, general>, staged_forward<T, true, general>}},
          {{staged_backward<T, false, plain>, staged_backward<T, true, plain>},
           {staged_backward<T, false, general>, staged_backward<T, true, general>}},
          {seam_sums<T, false>, seam_sums<T, true>},
          finish<Acc<T>>,
          clear<T>};
}

}  // namespace divnorm::cuda
