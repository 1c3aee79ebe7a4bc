"""Typed errors of the window runtime and the pass."""


class NworError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(NworError, ValueError):
    """A setting has a value that does not exist, or two settings contradict each other."""


class WindowOrderError(NworError, RuntimeError):
    """begin, commit or abort was called in the wrong order; the state is unchanged."""


class WindowInputError(NworError, ValueError):
    """An argument of `Window` or `begin` does not fit; nothing was registered, no window opened."""


class StagingAllocationError(NworError, MemoryError):
    """The staging buffers did not fit in memory; nothing was registered."""
