"""MSSR for BasicSR: one super-resolution network that holds many smaller ones, nested inside each other.

Nothing is imported here: which module comes first decides nothing, and ``import mssr_basicsr`` alone costs nothing.
"""

__version__ = '0.1.0'
