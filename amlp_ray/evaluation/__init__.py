"""Evaluate an encoder with labels: linear probe, fine-tuning, metrics and diagnostics."""
