"""What of a machine can change a result's bits."""

import torch

from permafrost.machine import machine_identity
from small_runs import CPU


def test_machine_identity():
    known = machine_identity(CPU, "float32")
    assert known["device"] == "cpu"
    assert known["threads"] == torch.get_num_threads()
    assert known["torch"] == torch.__version__
