"""Running a study: driver, monitor, Tune searcher, trial queue, one trial, plan, preflight."""
