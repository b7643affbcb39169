"""What stages that compute share: the device, the network and the stored trainings."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from permafrost.artifacts import file_digest, require, save_record, write_atomically
from permafrost.devices import prepare_device, tell_cards_in_use, worker_devices
from permafrost.experiment import new_network
from permafrost.explain import conv_layers
from permafrost.machine import machine_identity
from permafrost.models import NETWORKS, TaskNetwork
from permafrost.names import check_names
from permafrost.params import Params
from permafrost.paths import project_root
from permafrost.runs.results import Result, obtain_result
from permafrost.runs.store import RunStore
from permafrost.stages.shared import FIRST, PARAMS, RANKS, open_stage, read_orders, seed_file
from permafrost.tensors import load_state


@dataclass(frozen=True)
class Workspace:
    """A stage's surroundings.

    Attributes
    ----------
    params : Params
        Validated.
    device : torch.device
        Where to compute.
    store : RunStore
        The stored trainings.
    began : float
        When the stage began, in seconds since the epoch.
    """

    params: Params
    device: torch.device
    store: RunStore
    began: float = field(default_factory=time.time)

    @cached_property
    def worker_devices(self) -> list[torch.device]:
        """Return the device of each process that trains runs."""
        return worker_devices(self.device, self.params.sweep.workers)

    def first_network(self, seed: int) -> TaskNetwork:
        """Return the network of a seed after its first task, on the device."""
        network = new_network(self.params, seed)
        load_state(seed_file(FIRST, seed), network)
        return network.to(self.device)

    def obtain(
        self,
        stage: str,
        settings: dict[str, Any],
        inputs: Iterable[Path],
        code: Iterable[str],
        make: Callable[[], Result],
    ) -> Result:
        """Return a stage's result, made or kept from when the same was asked for.

        Parameters
        ----------
        stage : str
            Its name.
        settings : dict
            All that it depends on besides inputs, code and machine.
        inputs : iterable of Path
            The files that it reads.
        code : iterable of str
            The modules that it runs, besides the network's.
        make : callable
            Makes it.
        """
        identity = {
            "stage": stage,
            "settings": settings,
            "inputs": {str(path): file_digest(path) for path in inputs},
            "machine": machine_identity(self.device, "float32"),
        }
        code = [NETWORKS.home(self.params.model.arch), *code]
        return obtain_result(self.store.root, identity, code, make)

    def orders(self, seed: int, metric: str) -> dict[str, torch.Tensor]:
        """Return the order of every layer's filters by one metric.

        Raises
        ------
        InputError
            As :func:`read_orders`, and if the ranking is of another network.
        """
        orders = {name: torch.tensor(order) for name, order in read_orders(seed, metric).items()}
        for name, filters in self._filters.items():
            whole = name in orders and len(orders[name]) == filters
            require(whole, seed_file(RANKS, seed), f"has no ranking of layer {name} by {metric}")
        return {name: orders[name] for name in self._filters}

    @cached_property
    def _filters(self) -> dict[str, int]:
        """Return how many filters each layer has; the same of every seed."""
        layers = conv_layers(new_network(self.params, self.params.seeds[0]))
        return {name: layer.out_channels for name, layer in layers.items()}

    def tell_unlogged(self, *records: dict[str, Any]) -> None:
        """Tell that the stage has logged nothing, if all its trainings were stored before."""
        if records and not any(self.store.is_new(row["key"], self.began) for row in records):
            print(
                "nothing had to be trained, so nothing was logged to MLflow; "
                "`permafrost track` logs what it lacks"
            )


@contextmanager
def open_workspace(stage: str, seed: int | None = None) -> Iterator[Workspace]:
    """Prepare a stage that computes; as :func:`open_stage`, which it is built on.

    Raises
    ------
    InputError
        Also if something that params.yaml names is not there, or a GPU is asked for and there is
        none.
    """
    with open_stage(stage, seed) as params:
        check_names(params, PARAMS.name)
        device = prepare_device(params.runtime.device, params.runtime.threads)
        workspace = Workspace(params, device, RunStore(project_root()))
        if seed is None:  # of many runs
            tell_cards_in_use(workspace.worker_devices)
        yield workspace


def publish_run(store: RunStore, record: dict[str, Any], model: Path, results: Path) -> None:
    """Write a run's weights and its record into a stage's own outputs.

    Without the parameters that MLflow shows: some do not change the training, which then is the one
    that was stored under others.
    """
    write_atomically(model, store.model_path(record["key"]).read_bytes())
    save_record(results, {name: value for name, value in record.items() if name != "params"})
