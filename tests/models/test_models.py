"""Every model of the zoo by every measure of curvature: right, or refused in clear words."""

import pytest
import torch.distributed as dist

from models.cells import MEASURES, cell
from models.zoo import CASES


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", CASES)
def test_right_or_refused(name, measure):
    try:
        cell(name, measure)
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("transformers", "lightning"):
            raise
        pytest.skip(f"needs the extra `models`: {error}")
