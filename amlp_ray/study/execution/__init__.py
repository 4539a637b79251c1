"""A study at work: its plan, its queue, Tune's searcher, the driver and one trial."""
