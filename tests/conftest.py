"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="session")
def shared_data():
    """The folder with real data beside the project, or a skip that says so."""
    folder = Path(os.environ.get("LLM_UNLEARN_TEST_DATA", Path(__file__).parents[1].parent / "shared/data"))
    if not folder.is_dir():
        pytest.skip(f"real data is absent ({folder}); set LLM_UNLEARN_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """Paths of the small untrained model and the ragged rows of tiny_world.py."""
    from tiny_world import make_tiny_world

    return make_tiny_world(tmp_path_factory.mktemp("tiny_world"))


@pytest.fixture(scope="session")
def start_weights(tiny_world):
    """The tensors from which every run on the tiny world starts."""
    from tiny_world import weights

    return weights(tiny_world["model"])
