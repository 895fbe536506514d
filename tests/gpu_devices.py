"""Fixtures for tests of CUDA kernels: the emulated device, and the card where there is one."""
