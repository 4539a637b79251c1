"""Searching: a space, a searcher, trials, and the study that holds them."""
