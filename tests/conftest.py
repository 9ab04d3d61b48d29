"""What every test needs."""

import pytest
import torch

# The models are tiny: a second thread would only wait for the first.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    """TransformerLens models, each built when it is first asked for."""
    from tl_models import References

    return References(lambda: tmp_path_factory.mktemp("reference"))
