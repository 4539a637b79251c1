"""Run the command line as `python -m amlp_ray`."""

from amlp_ray.cli import main

main()
