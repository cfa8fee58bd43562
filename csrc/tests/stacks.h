// A thread of control on a stack of its own.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace divnorm::cuda {

#ifdef __x86_64__

// What ucontext.h does too, but with calls of the system for signals in every switch; and AddressSanitizer, which is
// told of the switches anyway, would mark all of the stack as fresh in each.
class Context {
 public:
  // Where switch_to() comes first; entry never returns.
  void start(char* stack, size_t bytes, void (*entry)()) {
    auto* top = reinterpret_cast<uintptr_t*>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15});
    *--top = 0;  // entry's return address, behind which nothing is unwound
    *--top = reinterpret_cast<uintptr_t>(entry);
    for (int i = 0; i < kKept; ++i) *--top = 0;
    top_ = top;
  }
  // Leaves the present one as `from`, and goes on here.
  void switch_to(Context& from) { switch_stacks(&from.top_, top_); }

 private:
  static constexpr int kKept = 6;  // registers
  // Nobody may know that it leaves some registers as they are: the other side does not.
  [[gnu::naked, gnu::noipa]] static void switch_stacks(uintptr_t**, uintptr_t*) {
    asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15;"
        "movq %rsp, (%rdi); movq %rsi, %rsp;"
        "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
  }
  uintptr_t* top_ = nullptr;
};

#else

class Context {
 public:
  void start(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void switch_to(Context& from) { swapcontext(&from.context_, &context_); }

 private:
  ucontext_t context_;
};

#endif

}  // namespace divnorm::cuda
