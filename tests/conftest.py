import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Ray settles for good, at a process's first cluster, whether it asks for tokens, and a later one is started as the
# environment says by then: all clusters of a test process are of one mode.
os.environ["RAY_AUTH_MODE"] = "disabled"


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def blank_store(tmp_path_factory):
    """The file of an MLflow store without anything in it: a copy is there at once, one made anew takes seconds."""
    from cluster import tracking

    path = tmp_path_factory.mktemp("blank") / "mlflow.db"
    tracking.connect(f"sqlite:///{path}")
    return path


@pytest.fixture
def plain_environment(monkeypatch):
    """Of commands in this process, and of their workers."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that the two processes end together. Files stay whole (`--dist loadfile`),
    for what their tests share; xdist_group does nothing from pytest 9.2 on, with pytest-xdist 3.8 or older."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
