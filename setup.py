"""Package metadata of llm_unlearn; `pip install -c constraints.txt -e '.[dev]'` installs all that a developer needs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
REQUIREMENTS = [
    line
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "llm_unlearn/__init__.py").read_text(encoding="utf-8")).group(1)

setup(
    name="llm_unlearn",
    version=VERSION,
    description="Make a causal language model forget: unlearning methods as Hugging Face Trainer subclasses",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["llm_unlearn", "llm_unlearn.*"]),
    package_data={
        "llm_unlearn.evaluation": ["modules/*/*.py"],
        "llm_unlearn.evaluation.tasks": ["*.yaml"],
        "llm_unlearn.report": ["*.j2", "*.css", "*.js"],
    },
    install_requires=REQUIREMENTS,
    extras_require={
        "dev": [
            "lm_eval>=0.4.13",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6",
            "ruff>=0.6",
            "pre-commit>=3",
            "playwright>=1.50",
        ],
        "lm_eval": ["lm_eval>=0.4.13"],
        "quantization": ["bitsandbytes>=0.45", "torchao>=0.18"],
        "liger": ["liger-kernel>=0.5"],
    },
)
