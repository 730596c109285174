// ptx/launches.cuh on the CPU - a launch begins when the one before it has ended.
#pragma once
#include <flashcore/types.cuh>

namespace flashcore {

__forceinline__ void griddepcontrol_wait() {}
__forceinline__ void griddepcontrol_launch_dependents() {}

}  // namespace flashcore
