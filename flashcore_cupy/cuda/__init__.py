"""What CuPy lacks of CUDA: driver calls, the memory of captured calls, what targets have."""
