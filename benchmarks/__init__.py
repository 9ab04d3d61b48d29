"""What attribution costs beside the forward pass that it needs: ``python -m benchmarks``."""
