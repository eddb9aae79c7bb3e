"""The sparse runtime: networks whose convolutions skip their zeros, on a CPU; see docs/runtime.md."""

#: What runs a level: ``auto`` skips zeros on a CPU where that is faster, ``torch`` is torch alone.
ENGINES = ('auto', 'torch')
