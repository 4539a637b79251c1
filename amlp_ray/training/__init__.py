"""The training core: pretraining loop, objectives, training state, checkpoints and loggers.

Nothing here imports Ray.
"""
