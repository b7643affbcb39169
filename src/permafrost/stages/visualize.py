"""Stage visualize: a picture of what each convolution filter looks for."""

from permafrost.artifacts import load_tasks, save_tensors
from permafrost.experiment import explain_config
from permafrost.explain import conv_layers, heat_maps, start_image
from permafrost.pictures import draw_filters
from permafrost.stages.workspace import (
    FILTER_PICTURES,
    FILTERS,
    TASKS,
    open_stage,
    progress_bar,
    seed_file,
)
from permafrost.strategies.reranking import visualize_network


def run(seed: int) -> None:
    """Write the filters' pictures and heat maps of one seed's first-task network."""
    with open_stage("visualize", seed) as workspace:
        sequence = load_tasks(seed_file(TASKS, seed))
        config = explain_config(workspace.params)
        model = workspace.first_network(seed).view("shared", 0, 1)
        normalization = sequence.normalization
        size = sequence.tasks[0].train.images.shape[-1]
        start = start_image(size, normalization.mean, normalization.std, config.start_seed)
        start = start.to(workspace.device)
        total = sum(layer.out_channels for layer in conv_layers(model).values())
        with progress_bar(f"filter pictures, seed {seed}", total) as advance:
            pictures = visualize_network(model, start, config, advance)
        tensors = {f"{name}/pictures": values for name, values in pictures.items()}
        tensors |= {
            f"{name}/maps": heat_maps(values, start, config.heat_map)
            for name, values in pictures.items()
        }
        save_tensors(seed_file(FILTERS, seed), tensors, {"layers": list(pictures)})
        draw_filters(FILTER_PICTURES / str(seed), pictures, normalization)
