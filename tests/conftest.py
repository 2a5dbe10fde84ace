from pathlib import Path

import pytest
import torch


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


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items):
    """Files stay whole, for what their tests share. Slow tests come first; most of them start Ray clusters and go one
    after another in one process, the others, which say so, with their file."""
    for item in items:
        name = "ray" if item.get_closest_marker("slow") else Path(item.fspath).stem
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(name))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
