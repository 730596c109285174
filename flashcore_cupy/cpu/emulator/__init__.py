"""The kernels of `kernels/`, unchanged, on a CPU: compiled by a C++ compiler, thread by thread."""
