"""Typed errors. Each message names the tensor or argument, the value found and the value wanted."""

__all__ = [
    "CacheFullError",
    "CheckpointError",
    "ContextLengthError",
    "DeviceUnavailableError",
    "InvalidShapeError",
    "UnsupportedModelError",
]


class InvalidShapeError(ValueError):
    """An array has the wrong shape, dtype or values for the call."""


class CheckpointError(ValueError):
    """A checkpoint's bytes contradict themselves, its configuration or its format."""


class UnsupportedModelError(CheckpointError):
    """A well-formed checkpoint that this version cannot run; the message says what to do."""


class ContextLengthError(ValueError):
    """A prompt and the tokens asked for do not fit the model's context."""


class CacheFullError(RuntimeError):
    """A KV cache has no room for the tokens of a call; the cache is unchanged."""


class DeviceUnavailableError(RuntimeError):
    """The device asked for is absent; the message says what is missing."""
