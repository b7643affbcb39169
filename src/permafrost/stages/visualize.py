"""Stage visualize: a picture of what each convolution filter looks for."""

from permafrost.artifacts import load_tasks, save_tensors
from permafrost.experiment import explain_config
from permafrost.explain import conv_layers
from permafrost.pictures import draw_filters
from permafrost.ranking.method import visualize_network
from permafrost.stages.workspace import (
    FILTER_PICTURES,
    FILTERS,
    TASKS,
    open_stage,
    progress_bar,
    seed_file,
)


def run(seed: int) -> None:
    """Write the filters' pictures and heat maps of one seed's first-task network."""
    with open_stage("visualize", seed) as workspace:
        sequence = load_tasks(seed_file(TASKS, seed))
        config = explain_config(workspace.params)
        model = workspace.first_network(seed).view("shared", 0, 1)
        size = sequence.tasks[0].train.images.shape[-1]
        total = sum(layer.out_channels for layer in conv_layers(model).values())
        with progress_bar(f"filter pictures, seed {seed}", total) as advance:
            pictures, maps = visualize_network(model, size, sequence.normalization, config, advance)
        tensors = {f"{name}/pictures": values for name, values in pictures.items()}
        tensors |= {f"{name}/maps": values for name, values in maps.items()}
        save_tensors(seed_file(FILTERS, seed), tensors, {"layers": list(pictures)})
        draw_filters(FILTER_PICTURES / str(seed), pictures, sequence.normalization)
