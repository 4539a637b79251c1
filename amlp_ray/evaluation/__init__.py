"""What an encoder is worth, by labels: the probe of a search, fine-tuning that confirms, and predictions."""
