"""What every test stands on: one thread, no network, no cache of the user's, nothing left behind."""

from __future__ import annotations

import os
import tempfile

# Before the first import of torch, tokenizers and the hub's client: they read these once. Processes that a test starts
# inherit them.
_HOME = tempfile.TemporaryDirectory(prefix="kd-lightning-tests-")
os.environ.update(
    OMP_NUM_THREADS="1",  # two workers on two cores, and gloo ranks beside them: more threads only wait for each other
    MKL_NUM_THREADS="1",
    OMP_WAIT_POLICY="PASSIVE",  # the few that set more threads wait asleep
    TOKENIZERS_PARALLELISM="false",  # its threads do not survive a fork
    HF_HUB_OFFLINE="1",  # a name that is no folder must fail at once
    HF_DATASETS_CACHE=_HOME.name,  # tokenised rows of an earlier run would hide a fault
)

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same numbers whichever tests ran before."""
    torch.manual_seed(0)
