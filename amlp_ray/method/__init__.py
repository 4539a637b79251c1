"""AMLP itself: model, patch selection, masking ratio, losses. Pure tensor code: no files, no Ray."""
