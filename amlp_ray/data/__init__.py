"""Folders of images -> a patch dataset -> batches. Import from the modules; nothing is loaded from here."""
