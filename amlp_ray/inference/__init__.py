"""Prediction: masks of images in files and volumes, by a fine-tuned segmenter."""
