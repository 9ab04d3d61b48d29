"""Residual streams: declarations of their writes, and the modules that these name."""
