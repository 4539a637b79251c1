"""`python -m amlp_ray`, the same as `amlp-ray`."""

from amlp_ray.cli import main

main()
