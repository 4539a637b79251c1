"""Map the top-level `studies/` into the package, which pyproject.toml alone cannot express."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["amlp_ray", "amlp_ray.*"]), "amlp_ray.studies"],
    package_dir={"amlp_ray.studies": "studies"},
    package_data={
        "amlp_ray": ["py.typed", "**/*.html", "**/*.css"],
        "amlp_ray.studies": ["*.yaml"],
    },
)
