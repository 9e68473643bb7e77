"""Compiles the sources of the native kernels beside each other; all else is in pyproject.toml."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from setuptools import setup
from setuptools.command.build_ext import build_ext


class BuildExt(build_ext):
    """`build_ext` that compiles as many sources of an extension at a time as there are cores, in the order given."""

    def build_extension(self, ext: Any) -> None:
        """Compile and link one extension."""
        compiler = self.compiler
        compile_all = compiler.compile

        def compile_each(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_all([source], **options), sources)
                return [name for names in objects for name in names]

        compiler.compile = compile_each
        try:
            super().build_extension(ext)
        finally:
            compiler.compile = compile_all


setup(cmdclass={"build_ext": BuildExt})
