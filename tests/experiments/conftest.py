import os
from unittest import mock

import pytest


@pytest.fixture(autouse=True)
def own_environment():
    """A launcher sets variables for the processes that it starts."""
    with mock.patch.dict(os.environ):
        yield
