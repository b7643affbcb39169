"""A run as something to be sent: to another process, or to another machine."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from permafrost.devices import prepare_device
from permafrost.errors import InputError
from permafrost.experiment import Masks, RunInputs, request_run, train_run
from permafrost.machine import fingerprint
from permafrost.params import Params
from permafrost.registry import find_custom
from permafrost.runs.key import sources_digest
from permafrost.runs.spec import RunSpec
from permafrost.runs.store import FinishedRun, RunStore
from permafrost.source import PACKAGE
from permafrost.strategies import STRATEGIES


@dataclass(frozen=True, eq=False)
class RunJob:
    """A run with all that it needs; it can be pickled.

    Attributes
    ----------
    params : Params
        All parameters.
    spec : RunSpec
        Which run.
    read_inputs : callable
        Returns the inputs of its seed.
    masks : mapping of str to Tensor, or None
        As of :func:`permafrost.experiment.request_run`.
    code : str
        Hash of the code by which it is to be trained.
    """

    params: Params
    spec: RunSpec
    read_inputs: Callable[[], RunInputs]
    masks: Masks | None
    code: str = field(default_factory=sources_digest)

    @property
    def name(self) -> str:
        """Return the run's name for people."""
        return self.spec.name

    def perform(self, store: RunStore, device: torch.device) -> dict[str, Any]:
        """Train the run on a device, or find it stored; return its record.

        Raises
        ------
        InputError
            If other code runs here.
        """
        self._refuse_other_code()
        return train_run(store, self.params, self.spec, self.read_inputs(), self.masks, device)

    def by_content(self) -> "RunJob":
        """Return the job with its inputs read, for where the project's files are not."""
        inputs = self.read_inputs().by_content(STRATEGIES.find(self.spec.strategy))
        return replace(self, read_inputs=partial(_same, inputs))

    def perform_apart(self, device: torch.device) -> FinishedRun:
        """Train the run where no store is; return it whole, to be sent back.

        Threads and determinism are set as the parameters say, and a module of ``custom`` is found
        in the working folder. It is not resumed: what is interrupted there begins anew.

        Raises
        ------
        InputError
            If other code is here, or no such device.
        """
        find_custom(Path.cwd())
        self._refuse_other_code()
        device = prepare_device(str(device), self.params.runtime.threads)
        inputs = self.read_inputs()
        request, train = request_run(self.params, self.spec, inputs, self.masks, device)
        outcome = train(None, lambda _: None).on_cpu()
        return FinishedRun(request.key, request, outcome, fingerprint())

    def _refuse_other_code(self) -> None:
        if self.code != sources_digest():
            raise InputError(
                f"{PACKAGE}: this code, or what is in custom, is not what the run was sent by; it "
                "was changed while its stage ran, or is of another copy"
            )


def _same(inputs: RunInputs) -> RunInputs:
    return inputs
