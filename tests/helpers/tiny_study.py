"""The smallest study that does everything a study does; seconds per trial."""

from typing import Any

TINY: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "pretrain": {
        "epochs": 4,
        "batch_size": 12,
        "model": {"width": 24, "depth": 1, "heads": 2, "decoder_width": 16, "decoder_heads": 2},
    },
    "space": {
        "ratio.start": {"low": 0.2, "high": 0.5},
        "selection.mode": {"choices": ["hard", "soft"]},
    },
    "probe": {"num_labeled": 12, "subsets": 2, "folds": 2},
    "pruner": {"name": "none", "rungs": 2},
    "budget": {"trials": 3},
    "baselines": ["scratch", "mae"],
    "baseline_seeds": 1,
}
