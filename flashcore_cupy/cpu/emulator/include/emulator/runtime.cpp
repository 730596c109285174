// runtime.cpp - what all emulated kernels have in common, compiled once: without -fsanitize=thread,
// for it is not the kernel's accesses that are to be watched here.
#define EMULATOR_RUNTIME
#define __CUDA_ARCH__ 900
// Of types.cuh: by clang the kernel defines a constant of this name, too.
#define IS_BFLOAT16 IS_BFLOAT16_IN_RUNTIME
#include <emulator/clocks.cpp>
#include <emulator/launch.cpp>
#include <emulator/machine.cpp>
#include <emulator/memory.cpp>
#include <emulator/registers.cpp>
#include <emulator/scheduler.cpp>
#include <emulator/setmaxnreg.cpp>
#include <emulator/shadow.cpp>
#include <emulator/signals.cpp>
#include <emulator/tsan.cpp>
#include <flashcore/ptx/mma.cuh>
#include <flashcore/ptx/wgmma.cuh>
#include <flashcore/ptx/wmma.cuh>
