"""Every method of the family on the main job: `python -m benchmarks.family`."""
