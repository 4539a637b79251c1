"""Compare samplers and pruners by the epochs that a search needs, on a table of finished trainings.

    # 30 seeds of everything: two hours, of which gp is most
    python benchmarks/search.py
    python benchmarks/search.py --methods random tpe+halving --seeds 10 --workers 1
    # replays are kept there, and those that are there not run again
    python benchmarks/search.py --out FOLDER

First it prints what can be known from the table at all: how well each rung ranks, the noise of
seeds, and what settings explain. Then it replays searches, and prints after how many epochs each
method has found what random search finds in the whole budget.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

# Before numpy and torch are imported: replays run side by side instead.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import optuna
from search_figure import Run, draw
from search_replay import (
    Answer,
    Bowl,
    Nearest,
    Smooth,
    Step,
    Table,
    at,
    needed,
    places,
    read_table,
    replay,
)

from amlp_ray.study.confirmation.statistics import Correlation, rank_correlation, seed_noise

RESULTS = Path(__file__).parent / "results"
IMAGES = 321  # that a row of the table trained on: 20 steps an epoch
FULL = 60  # trials at full length that random search gets
SHARE = 0.25  # of its epochs in which others are to find as good a setting
# a rung ranks from where the whole interval of its correlation with the last one lies above
RANKS = 0.5

NONE = {"name": "none", "rungs": 9}
HALVING = {
    "rungs": 3,
    "spacing": "geometric",
    "reduction_factor": 3,
    "min_steps": 0,
}  # after 3, 9 and 27 epochs
Rules = tuple[dict[str, Any], dict[str, Any]]


def methods(ranking: int) -> dict[str, Rules]:
    """Sampler and pruner of each method. `ranking`: epochs of the first rung that ranks."""
    tpe, gp, random = {"name": "tpe"}, {"name": "gp"}, {"name": "random"}
    halving, hyperband = {"name": "halving", **HALVING}, {"name": "hyperband", **HALVING}
    late = {"rungs": 9, "min_steps": ranking * (IMAGES // 16)}
    return {
        "random": (random, NONE),
        "tpe": (tpe, NONE),
        "gp": (gp, NONE),
        "random+halving": (random, halving),
        "tpe+halving": (tpe, halving),
        "gp+halving": (gp, halving),
        "tpe+hyperband": (tpe, hyperband),
        "tpe+halving, ranking rungs": (tpe, {"name": "halving", **late}),
        "tpe+median, ranking rungs": (tpe, {"name": "median", **late}),
        "tpe+median, 400 steps": (tpe, {"name": "median", "rungs": 9}),
    }


# By table and seed. Where rows are shuffled, settings tell nothing, and what is left is what
# stopping early gives
ANSWERS: dict[str, Callable[[Table, int], Answer]] = {
    "once": lambda table, _: Nearest(table),
    "again": lambda table, _: Nearest(table, again=True),
    "smooth": lambda table, _: Smooth(table),
    "shuffled": lambda table, seed: Nearest(table.shuffled(seed)),
    "bowl": lambda table, _: Bowl(table),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, default=RESULTS / "search_table.csv")
    parser.add_argument("--study", type=Path, default=Path(__file__).parent / "search_table.yaml")
    parser.add_argument("--methods", nargs="+", choices=list(methods(0)), default=list(methods(0)))
    parser.add_argument(
        "--answers", nargs="+", choices=ANSWERS, default=list(ANSWERS), help="see search_replay.py"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder of replays; none: nothing is kept")
    parser.add_argument("--csv", type=Path, help="the summary")
    parser.add_argument("--figure", type=Path, help="HTML file")
    args = parser.parse_args()
    table = read_table(args.table, args.study)
    ranking = print_table_noise(table)
    runs = run_all(args, ranking)
    rows = summary(runs, table.rungs[-1] * FULL)
    print_summary(rows, table.rungs[-1] * FULL)
    if args.csv:
        lines = [
            ",".join(rows[0]),
            *(",".join(_cell(value) for value in row.values()) for row in rows),
        ]
        args.csv.write_text("\n".join(lines) + "\n")
    if args.figure:
        targets = {(row["answer"], row["workers"]): row["target"] for row in rows}
        draw(runs, targets, table.rungs[-1] * FULL, SHARE, args.figure)


# What the table can tell


def print_table_noise(table: Table) -> int:
    """Print ranks and noise; return the first rung that ranks."""
    last = table.scores[:, -1]
    print(
        f"{len(last)} settings, {table.rungs[-1]} epochs each, {table.seconds.sum() / 3600:.1f} "
        f"hours of training\n"
    )
    print(
        "| epochs | rank correlation with the last (95 %) | best fifth that is in the better "
        "third |\n|---|---|---|"
    )
    ranking = None
    for i, rung in enumerate(table.rungs):
        correlation = rank_correlation(table.scores[:, i].tolist(), last.tolist())
        low, high = correlation.interval or (math.nan, math.nan)
        ranking = ranking or (rung if low >= RANKS else None)
        top, third = (
            last >= np.quantile(last, 0.8),
            table.scores[:, i] >= np.quantile(table.scores[:, i], 2 / 3),
        )
        print(
            f"| {rung} | {correlation.value:.2f} ({low:.2f}-{high:.2f}) | {third[top].mean():.0%} |"
        )
    noise = seed_noise(list(table.baselines.values())) or math.nan
    free = sum(len(values) - 1 for values in table.baselines.values())
    guess = explained(table)
    low, high = guess.interval or (math.nan, math.nan)
    quartiles = np.percentile(last, [0, 25, 50, 75, 100])
    print(
        f"\nDSC of settings: SD {last.std(ddof=1):.4f}; "
        + " ".join(f"{value:.3f}" for value in quartiles)
    )
    print(
        "(lowest, quartiles, highest). Baselines: "
        + "; ".join(f"{n} {_triple(v)}" for n, v in table.baselines.items())
    )
    print(
        f"Noise of seeds, SD over repeats of the baselines: {noise:.4f} ({free} degrees of freedom)"
    )
    print(
        f"Settings, by a forest, of rows left out: rank correlation {guess.value:.2f} "
        f"({low:.2f}-{high:.2f})"
    )
    rng = np.random.default_rng(0)
    bests = [rng.choice(last, FULL, replace=False).max() for _ in range(4000)]
    print(f"Best of {FULL} rows drawn evenly: {_triple(quartiles_of(bests))} (quartiles)")
    print(f"First rung that ranks (interval above {RANKS}): epoch {ranking}\n")
    return ranking or table.rungs[-1]


def explained(table: Table) -> Correlation:
    """How well settings predict the last score of rows left out; near 0, no sampler can be
    better than random."""
    from sklearn.ensemble import RandomForestRegressor

    forest = RandomForestRegressor(1000, min_samples_leaf=3, oob_score=True, random_state=0)
    last = table.scores[:, -1]
    forest.fit(places(table.params, table.distributions), last)
    return rank_correlation(forest.oob_prediction_.tolist(), last.tolist())


# Replays


def run_all(args: argparse.Namespace, ranking: int) -> dict[Run, list[Step]]:
    tasks: list[Run] = list(product(args.answers, args.methods, args.workers, range(args.seeds)))
    where = [args.table, args.study, ranking, args.out]
    with ProcessPoolExecutor(args.processes) as pool:
        results = pool.map(run, tasks, *([one] * len(tasks) for one in where))
        return dict(zip(tasks, results, strict=True))


_tables: dict[Path, Table] = {}  # of a process


def run(trial_spec: Run, rows: Path, study: Path, ranking: int, out: Path | None) -> list[Step]:
    """One replay, or what was kept of it."""
    kind, method, workers, seed = trial_spec
    cache_file = (
        out / f"{kind}-{method.replace(' ', '_').replace(',', '')}-{workers}-{seed}.json"
        if out
        else None
    )
    if cache_file and cache_file.exists():
        return [Step(*step) for step in json.loads(cache_file.read_text())]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    table = _tables.setdefault(rows, read_table(rows, study))
    sampler, pruner = methods(ranking)[method]
    config = table.config(f"replay-{seed}", seed, sampler, pruner)
    budget = table.rungs[-1] * FULL
    steps = replay(
        table, config, ANSWERS[kind](table, seed), images=IMAGES, workers=workers, budget=budget
    )
    if cache_file:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        cache_file.write_text(json.dumps([list(vars(step).values()) for step in steps]))
    return steps


def summary(runs: dict[Run, list[Step]], budget: float) -> list[dict[str, Any]]:
    """A row per way to answer, method and number of workers. The target is random search's with
    fewest workers."""
    rows = []
    for kind, workers in dict.fromkeys((kind, workers) for kind, _, workers, _ in runs):
        first = min(w for k, _, w, _ in runs if k == kind)
        full = [
            at(s, budget, "best")
            for (k, m, w, _), s in runs.items()
            if (k, m, w) == (kind, "random", first)
        ]
        target = quartiles_of(full)[1] if full else math.nan
        for method in dict.fromkeys(m for k, m, w, _ in runs if (k, w) == (kind, workers)):
            step_lists = [
                steps
                for (k, m, w, _), steps in runs.items()
                if (k, m, w) == (kind, method, workers)
            ]
            epochs = quartiles_of([needed(steps, target) for steps in step_lists])
            row: dict[str, Any] = {
                "answer": kind,
                "workers": workers,
                "method": method,
                "target": target,
            }
            row |= {"trials": float(np.median([steps[-1].trials for steps in step_lists]))}
            row |= dict(zip(("epochs_q1", "epochs", "epochs_q3"), epochs, strict=True))
            row |= dict(
                zip(
                    ("share_low", "share", "share_high"),
                    shares(step_lists, target, budget),
                    strict=True,
                )
            )
            row |= {
                "reached_in_quarter": float(
                    np.mean([needed(s, target) <= SHARE * budget for s in step_lists])
                )
            }
            row |= {"reached": float(np.mean([needed(s, target) < math.inf for s in step_lists]))}
            for field, (name, spent) in product(
                ("best", "incumbent"), (("quarter", SHARE * budget), ("full", budget))
            ):
                values = quartiles_of([at(steps, spent, field) for steps in step_lists])
                row |= {
                    f"{field}_{name}{end}": v
                    for end, v in zip(("_q1", "", "_q3"), values, strict=True)
                }
            rows.append(row)
    return rows


def shares(
    step_lists: Sequence[Sequence[Step]], target: float, budget: float
) -> tuple[float, float, float]:
    """Median of the epochs needed, as a share of the budget, between the ends of its interval
    (bootstrap of seeds)."""
    epochs = np.array([needed(steps, target) for steps in step_lists])
    drawn = epochs[np.random.default_rng(0).integers(0, len(epochs), (2000, len(epochs)))]
    medians = np.percentile(drawn, 50, axis=1, method="inverted_cdf")
    low, high = np.percentile(medians, [2.5, 97.5], method="inverted_cdf")
    return float(low) / budget, quartiles_of(epochs.tolist())[1] / budget, float(high) / budget


def quartiles_of(values: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles that are values of the sample, since some may be infinite."""
    low, middle, high = np.percentile(values, [25, 50, 75], method="inverted_cdf")
    return float(low), float(middle), float(high)


# What is shown


def print_summary(rows: Sequence[dict[str, Any]], budget: float) -> None:
    for kind, workers in dict.fromkeys((row["answer"], row["workers"]) for row in rows):
        rows_of_kind = [row for row in rows if (row["answer"], row["workers"]) == (kind, workers)]
        target = f"random search's best in {budget:.0f} epochs: {rows_of_kind[0]['target']:.4f}"
        print(f"Answers: {kind}; workers: {workers}; {target}\n")
        head = (
            "method | trials | epochs needed (quartiles) | share (95 %) | within a quarter | "
            "within all"
        )
        print(f"| {head} | best after a quarter | best after all | incumbent after all |")
        print("|---" * 9 + "|")
        for row in rows_of_kind:
            epochs = (
                f"{_count(row['epochs'])} ({_count(row['epochs_q1'])}-{_count(row['epochs_q3'])})"
            )
            share = (
                f"{_share(row['share'])} ({_share(row['share_low'])}-{_share(row['share_high'])})"
            )
            reached = f"{row['reached_in_quarter']:.0%} | {row['reached']:.0%}"
            bests = " | ".join(
                _range(row, name) for name in ("best_quarter", "best_full", "incumbent_full")
            )
            print(
                f"| {row['method']} | {row['trials']:.0f} | {epochs} | {share} | {reached} | "
                f"{bests} |"
            )
        print()


def _triple(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _count(epochs: float) -> str:
    return f"{epochs:.0f}" if epochs < math.inf else "never"


def _share(share: float) -> str:
    return f"{share:.2f}" if share < math.inf else "never"


def _range(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.4f} ({row[f'{name}_q1']:.4f}-{row[f'{name}_q3']:.4f})"


def _cell(value: Any) -> str:
    return (
        f"{value:.6g}"
        if isinstance(value, float)
        else f'"{value}"'
        if "," in str(value)
        else str(value)
    )


if __name__ == "__main__":
    main()
