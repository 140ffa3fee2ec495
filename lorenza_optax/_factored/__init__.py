"""Evaluating a loss at W + P N without forming it."""
