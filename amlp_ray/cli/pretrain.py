"""amlp-ray pretrain: one pretraining run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from amlp_ray.config import PretrainSettings, ResourceSettings
from amlp_ray.settings import build, from_assignments, read_yaml

Set = Annotated[list[str] | None, typer.Option("--set", help="name=value, such as ratio.start=0.3; repeatable.")]


def pretrain(
    data: Annotated[Path, typer.Argument(help="Patch dataset.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; one that holds a run of the same settings is resumed.")],
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    assign: Set = None,
    workers: Annotated[int, typer.Option(help="Ray Train workers; 1 trains in this process, without Ray.")] = 1,
    cpus_per_worker: Annotated[float | None, typer.Option(help="None: all cores, shared by the workers.")] = None,
    gpus_per_worker: Annotated[float, typer.Option(help="With several workers; one worker takes a GPU it sees.")] = 0,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join, with several workers.")] = None,
) -> None:
    """Pretrain an encoder on the unlabelled training images: encoder.safetensors, metrics, pictures."""
    settings = from_assignments(PretrainSettings, read_yaml(config) if config else {}, assign or [])

    from amlp_ray.data.dataset import PatchDataset

    dataset = PatchDataset.open(data)
    settings.check_image(dataset.spec)
    import os

    cores = os.cpu_count() or 1
    resources = build(
        ResourceSettings,
        {
            "workers": workers,
            "cpus_per_worker": cpus_per_worker or (cores if workers == 1 else 0.9 * cores / workers),
            "gpus_per_worker": gpus_per_worker,
        },
        "pretrain",
    )
    if address is None:
        from amlp_ray.runtime.ray_session import machine_resources
        from amlp_ray.study.plan import concurrency

        concurrency(resources, machine_resources())

    from amlp_ray.training.job import Job

    job = Job(
        settings, str(dataset.path), out.absolute(), threads=max(1, int(resources.cpus_per_worker)), label=out.name
    )
    if workers == 1:
        _here(job)
    else:
        from amlp_ray.runtime.ray_session import ray_session
        from amlp_ray.training.runners import run_on_ray

        with ray_session(address) as session:
            typer.echo(f"Ray dashboard: {session.dashboard or 'none'}")
            run_on_ray(job, resources, name=f"pretrain-{out.name}", storage=out.absolute() / "ray_train")
    typer.echo(f"encoder: {out / 'encoder.safetensors'}")
    typer.echo(f"pictures: {out / 'pictures'}")


def _here(job: object) -> None:
    from tqdm import tqdm

    from amlp_ray.training.job import Job
    from amlp_ray.training.pretrain import Hooks, Metrics
    from amlp_ray.training.runners import run_here

    assert isinstance(job, Job)
    with tqdm(total=job.settings.epochs, unit="epoch", dynamic_ncols=True) as bar:

        def report(metrics: Metrics, checkpoint: Path) -> None:
            bar.update(metrics["epoch"] - bar.n)
            bar.set_postfix_str(
                f"loss {metrics['loss']:.4f}, ratio {metrics['ratio']:.2f}, "
                f"{metrics['images_per_second']:.0f} img/s, waiting {metrics['wait_share']:.0%}"
            )

        result = run_here(job, Hooks(report=report))
        if result.epochs == job.settings.epochs and bar.n == 0:
            typer.echo(f"{job.folder} was finished before: {result.epochs} epochs.")
