"""Packages; everything else is in setup.cfg."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["kquant", "kquant.*"]), "kquant_tools"],
    package_dir={"kquant_tools": "tools"},  # the command line, without claiming the top-level name "tools"
)
