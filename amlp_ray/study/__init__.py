"""Searching: `study.py` is the way in; each folder is a room with one job, `design.py` what all of them share."""

import optuna

optuna.logging.set_verbosity(optuna.logging.WARNING)  # a line per state change is ours to print
