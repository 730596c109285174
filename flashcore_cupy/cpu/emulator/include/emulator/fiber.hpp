// fiber.hpp - a CUDA thread as a fiber: its own stack, and a switch that saves what a call keeps.
//
// Switching is a function call that returns on another stack. By the calling conventions of x86-64
// (System V) and of AArch64 a call keeps few registers; those are pushed, the stack pointer is
// exchanged, and they are popped again. Elsewhere ucontext does the same, more slowly.
#pragma once
#include <emulator/machine.hpp>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace emulator {

#if defined(__x86_64__) || defined(__aarch64__)

struct Context {
    void* stack_pointer = nullptr;
};

extern "C" void flashcore_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.globl flashcore_switch
.hidden flashcore_switch
.type flashcore_switch, @function
flashcore_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size flashcore_switch, .-flashcore_switch
)");
constexpr int SAVED_WORDS = 6;
#else
asm(R"(
.text
.globl flashcore_switch
.hidden flashcore_switch
.type flashcore_switch, %function
flashcore_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size flashcore_switch, .-flashcore_switch
)");
#endif

inline void switch_to(Context& from, Context& to) {
    flashcore_switch(&from.stack_pointer, to.stack_pointer);
}

// A context that begins with function(), on a stack; function must not return.
inline void prepare(Context& context, char* stack, size_t bytes, void (*function)()) {
    auto* top = reinterpret_cast<uint64_t*>(reinterpret_cast<uintptr_t>(stack + bytes) & ~63ull);
#if defined(__x86_64__)
    *--top = 0;  // as if function had been called: its frame begins 8 bytes off a multiple of 16
    *--top = reinterpret_cast<uint64_t>(function);
    for (int i = 0; i < SAVED_WORDS; ++i) *--top = 0;
#else
    top -= 20;
    for (int i = 0; i < 20; ++i) top[i] = 0;
    top[11] = reinterpret_cast<uint64_t>(function);  // x30: where ret goes
#endif
    context.stack_pointer = top;
}

#else

struct Context {
    ucontext_t context;
};
inline void switch_to(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
inline void prepare(Context& context, char* stack, size_t bytes, void (*function)()) {
    getcontext(&context.context);
    context.context.uc_stack.ss_sp = stack;
    context.context.uc_stack.ss_size = bytes;
    context.context.uc_link = nullptr;
    makecontext(&context.context, function, 0);
}

#endif

// Stacks of so many fibers. Each begins at a multiple of its size, with what a fiber knows of
// itself: a thread finds that by its stack pointer. Behind it lies a page that faults.
constexpr size_t PAGE = 4096;

class Stacks {
  public:
    explicit Stacks(int count) : bytes_((size_t(count) + 1) * STACK_BYTES) {
        memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory_ == MAP_FAILED) throw std::bad_alloc();
        const auto first = reinterpret_cast<uintptr_t>(memory_) + STACK_BYTES - 1;
        first_ = reinterpret_cast<char*>(first / STACK_BYTES * STACK_BYTES);
        for (int i = 0; i < count; ++i) mprotect(of(i) + HEAD, PAGE, PROT_NONE);
    }
    ~Stacks() { munmap(memory_, bytes_); }
    Stacks(const Stacks&) = delete;

    static constexpr size_t HEAD = PAGE, FREE = STACK_BYTES - HEAD - PAGE;
    char* of(int index) const { return first_ + size_t(index) * STACK_BYTES; }
    bool has(const void* p) const {
        return size_t(static_cast<const char*>(p) - static_cast<const char*>(memory_)) < bytes_;
    }
    void prepare(int index, Context& context, void (*function)()) const {
        emulator::prepare(context, of(index) + HEAD + PAGE, FREE, function);
    }

  private:
    size_t bytes_;
    void* memory_;
    char* first_;
};

}  // namespace emulator
