"""The GPU engine: CUDA kernels beside their launchers, compiled by NVRTC on first use.

Nothing here is imported with ``bitnet_ext``, and importing it needs no GPU and no CuPy.
"""
