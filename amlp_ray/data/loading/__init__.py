"""Turn a patch dataset into the batches of a training loop: mapped or streamed, in one order."""
