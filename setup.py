"""Adds what pyproject.toml has no key for: `conf/` stays at the top of the checkout and is installed in `data_prep`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["pretrain*", "data_prep*", "launch*"]), "data_prep.conf"],
    package_dir={"data_prep.conf": "conf"},
    package_data={
        "": ["py.typed", "*.html", "*.css", "*.js"],
        "data_prep.conf": ["*.yaml", "*/*.yaml", "*/*/*.yaml"],
    },
)
