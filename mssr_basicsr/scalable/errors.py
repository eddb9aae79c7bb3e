"""The error for scalable model files."""


class ScalableFileError(ValueError):
    """A ``.mssr`` file is corrupted or truncated, is not a ``.mssr`` file, or lacks what it was asked for."""
