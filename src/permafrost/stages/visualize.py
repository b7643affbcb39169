"""Stage visualize: a picture of what each convolution filter looks for."""

from permafrost.data import Batches, TaskSequence
from permafrost.experiment import explain_config
from permafrost.explain import conv_layers, strongest_images
from permafrost.pictures import draw_filters
from permafrost.ranking import method
from permafrost.runs.results import Result
from permafrost.stages.shared import FILTER_PICTURES, FILTERS, FIRST, TASKS, progress_bar, seed_file
from permafrost.stages.workspace import Workspace, open_workspace
from permafrost.tensors import load_tasks, save_tensors

_STRONGEST = 4  # images of each filter are noted, for the page


def run(seed: int) -> None:
    """Write the filters' pictures and heat maps of one seed's first-task network."""
    with open_workspace("visualize", seed) as workspace:
        sequence = load_tasks(seed_file(TASKS, seed))
        tensors, about = workspace.obtain(
            "visualize",
            workspace.params.visualize.model_dump() | {"seed": seed, "strongest": _STRONGEST},
            [seed_file(TASKS, seed), seed_file(FIRST, seed)],
            [method.__name__],
            lambda: _visualize(workspace, seed, sequence),
        )
        save_tensors(seed_file(FILTERS, seed), tensors, about)
        pictures = {name: tensors[f"{name}/pictures"] for name in about["layers"]}
        draw_filters(FILTER_PICTURES / str(seed), pictures, sequence.normalization)


def _visualize(workspace: Workspace, seed: int, sequence: TaskSequence) -> Result:
    """Return the pictures and heat maps of every layer's filters."""
    config = explain_config(workspace.params)
    model = workspace.first_network(seed).view("shared", 0, 1)
    size = workspace.params.split.height_and_width
    total = config.starts * sum(layer.out_channels for layer in conv_layers(model).values())
    batches = Batches(sequence.tasks[0].train, sequence.normalization, workspace.device)
    with progress_bar(f"filter pictures, seed {seed}", total) as advance:
        pictures, maps = method.visualize_network(
            model, size, sequence.normalization, config, batches, advance
        )
    tensors = {f"{name}/pictures": values for name, values in pictures.items()}
    tensors |= {f"{name}/maps": values for name, values in maps.items()}
    strongest = strongest_images(model, list(maps), method.InOrder(batches), _STRONGEST)
    tensors |= {f"{name}/strongest": places for name, places in strongest.items()}
    return tensors, {"layers": list(pictures)}
