from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Files stay whole, for what their tests share; those that start Ray clusters go one after another."""
    for item in items:
        name = "ray" if item.get_closest_marker("slow") else Path(item.fspath).stem
        item.add_marker(pytest.mark.xdist_group(name))
