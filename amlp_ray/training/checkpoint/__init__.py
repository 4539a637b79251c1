"""Checkpoints of a run, the encoder it exports, and the weights it may start from."""
