"""The best trials and all baselines again: repeats, both protocols, the test images, statistics."""
