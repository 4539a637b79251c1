"""What is tried next, and what is stopped: samplers, pruners, population-based training."""
