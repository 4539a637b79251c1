"""From a patch dataset to the batches of a training loop: resident, mapped or streamed, in one order."""
