"""From a folder of images to a patch dataset: look at everything, decide, write everything."""
