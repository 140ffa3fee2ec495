"""What a refresh costs and what it captures: `python -m benchmarks.refresh`."""
