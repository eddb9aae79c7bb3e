"""The sparse runtime: networks whose convolutions skip their zeros, on a CPU; see docs/runtime.md."""
