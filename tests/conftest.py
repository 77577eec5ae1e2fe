"""Without a GPU, use the interpreter for the kernels. This must be set before Triton is imported.

Use one thread, because the tensors are small.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Chunks of 16 steps in the scan, so that short texts have several."""
    monkeypatch.setattr("minimodels.ops.scan.WORK", 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of kernels if these can be neither compiled nor
    interpreted, and give the reason."""
    from minimodels.kernels import require

    from minimodels.errors import InputError

    try:
        require("rmsnorm", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except InputError as error:
        for item in items:
            if item.path.name.startswith("test_kernel_"):
                item.add_marker(pytest.mark.skip(reason=str(error)))
