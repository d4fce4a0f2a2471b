"""DeepSpeed's ZeRO through Accelerate on CPUs, for tests alone; `python deepspeed_on_cpus.py FLAGS`
under torchrun is `python -m atp_patch.train FLAGS` there.
"""

from __future__ import annotations

import sys
from unittest import mock

from accelerate import PartialState
from accelerate.utils import DistributedType

from atp_patch.train import main


def deepspeed_on_cpus() -> None:
    """Accelerate names a backend for the processes of accelerators alone; here it is gloo."""
    found = ("gloo", DistributedType.MULTI_CPU)
    mock.patch.object(PartialState, "_prepare_backend", return_value=found).start()


if __name__ == "__main__":
    deepspeed_on_cpus()
    sys.exit(main())
