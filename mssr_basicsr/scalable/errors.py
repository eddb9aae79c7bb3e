"""The one error of the scalable file."""


class ScalableFileError(ValueError):
    """A ``.mssr`` file is corrupted, cut short, no such file, or asked for what it does not have."""
