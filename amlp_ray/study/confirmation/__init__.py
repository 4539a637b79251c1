"""Repeated runs of the best trials and the baselines, the test images, and statistics."""
