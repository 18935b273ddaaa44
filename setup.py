"""What `pip install .` installs: the optimizer alone, as the package manifold_muon. An installation in place (-e) has everything."""

from setuptools import setup
from setuptools.command.build_py import build_py


class OptimizerAlone(build_py):
    """Leaves out the packages of the repository, whose names (data, model, scripts) are too general for an environment of others."""

    def run(self) -> None:
        if not self.editable_mode:
            self.packages = self.distribution.packages = ["manifold_muon"]
            self.py_modules = self.distribution.py_modules = []
        super().run()


setup(cmdclass={"build_py": OptimizerAlone})
