"""From folders of images to a patch dataset to batches. Import from the modules."""
