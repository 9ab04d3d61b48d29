"""The version of this library; its only copy."""

__version__ = "0.1.0"
