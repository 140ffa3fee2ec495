"""What each ascent finds, measured on LORENZA's own trajectory: `python -m benchmarks.ascent`."""
