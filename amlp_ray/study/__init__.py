"""Studies: search settings, confirm the best, report. `study.py` is the way in."""

import optuna

# The package logs each change of a trial's state itself.
optuna.logging.set_verbosity(optuna.logging.WARNING)
