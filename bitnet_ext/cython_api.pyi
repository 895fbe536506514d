"""The C ABI for Cython extensions; see cython_api.pxd and capi.h."""

__pyx_capi__: dict[str, object]
