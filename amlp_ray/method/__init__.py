"""AMLP itself: model, patch selection, masking ratio, losses.

Tensors only: no files, no Ray.
"""
