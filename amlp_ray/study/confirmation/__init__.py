"""The best trials and all arms again: repeats, both protocols, the test images, statistics."""
