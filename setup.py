"""Packages; everything else is in setup.cfg."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["kquant", "kquant.*"]), *find_packages("tools")],
    package_dir={"kquant_tools": "tools/kquant_tools"},
)
