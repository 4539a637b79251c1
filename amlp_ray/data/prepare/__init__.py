"""Turn a folder of images into a patch dataset: scan, assign splits, write."""
