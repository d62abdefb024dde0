"""What pyproject.toml cannot say: `kernels/` at the top of the tree is installed as `deepreg_fast.kernels`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["deepreg_fast", "deepreg_fast.*"]), "deepreg_fast.kernels"],
    package_dir={"deepreg_fast.kernels": "kernels"},
    package_data={"deepreg_fast": ["py.typed"], "deepreg_fast.data": ["*.json"]},
)
