"""Loops and what they keep: pretraining, scoring, fine-tuning, checkpoints. Only `runners` knows Ray."""
