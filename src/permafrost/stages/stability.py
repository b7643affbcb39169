"""Stage stability: how far each criterion's ranking can be trusted, on the first seed."""

from collections.abc import Mapping
from typing import Any

from permafrost.artifacts import save_record, write_atomically
from permafrost.params import Params
from permafrost.stages.shared import (
    FIRST,
    STABILITY,
    STABILITY_TABLE,
    TASKS,
    open_stage,
    progress_bar,
    seed_file,
)
from permafrost.tables import markdown

CHECKS = {
    "halves": "halves of the images",
    "start_image": "another start image",
    "float64": "float64",
    "random_labels": "labels shuffled",
    "random_weights": "weights untrained",
}

_AGREEMENT = (
    "Spearman's correlation of the order of filters with the order that comes out where something "
    "is changed and, in brackets, the part of the first half that both share; means over the "
    "layers. The first three ought to be near 1 (1.00), the last two near 0 (0.50)."
)
_TRUTH = (
    "Spearman's correlation of the scores with those of `ablation`, mean over layers and classes; "
    "and the test accuracy on task 1, in percent, when the worst filters of every layer are "
    "silenced."
)


def run() -> None:
    """Write what each criterion of ``stability.metrics`` agrees with, and its table."""
    with open_stage("stability") as params:
        # PyTorch takes seconds, and by default nothing is to be measured.
        found = _measure(params) if params.stability.metrics else {}
        save_record(STABILITY, {"seed": params.seeds[0], "criteria": found})
        write_atomically(STABILITY_TABLE, table(found).encode())
        print(f"stability: {len(found)} criteria")


def _measure(params: Params) -> dict[str, Any]:
    import torch

    from permafrost.devices import prepare_device
    from permafrost.experiment import explain_config, new_network
    from permafrost.names import check_names
    from permafrost.ranking import order_filters
    from permafrost.ranking.stability import (
        TRUTH,
        Subject,
        accuracy_without_worst,
        check_stability,
        compare_with_truth,
    )
    from permafrost.tensors import load_state, load_tasks

    check_names(params, "params.yaml")
    device = prepare_device(params.runtime.device, params.runtime.threads)
    seed, config = params.seeds[0], explain_config(params)
    sequence = load_tasks(seed_file(TASKS, seed))
    task = sequence.tasks[0]
    network, untrained = (new_network(params, seed).to(device).eval() for _ in range(2))
    load_state(seed_file(FIRST, seed), network)
    subject = Subject(
        network.view("shared", 0, 1),
        task.train,
        task.test,
        len(task.classes),
        sequence.normalization,
        config,
        seed,
        torch.device(device),
    )
    truth = subject.scores(TRUTH)
    found = {}
    with progress_bar("stability", len(params.stability.metrics)) as advance:
        for criterion in params.stability.metrics:
            scores = subject.scores(criterion)
            # The best first, whatever is frozen.
            orders = {n: order_filters(values, config.aggregate) for n, values in scores.items()}
            found[criterion] = {
                "checks": check_stability(subject, criterion, untrained.view("shared", 0, 1)),
                "ablation": compare_with_truth(scores, truth),
                "accuracy_without_worst": accuracy_without_worst(subject, orders),
            }
            advance(1)
    return found


def table(found: Mapping[str, Any]) -> str:
    """Return the tables as Markdown: means over the layers, and what silencing leaves."""
    if not found:
        return "# Stability of the rankings\n\nNothing is listed in `stability.metrics`.\n"
    agreements = [
        [criterion, *(_shown(about["checks"].get(check)) for check in CHECKS)]
        for criterion, about in found.items()
    ]
    shares = list(next(iter(found.values()))["accuracy_without_worst"])
    left = [
        [
            criterion,
            f"{_mean(_mean(values) for values in about['ablation'].values()):.2f}",
            *(f"{100 * about['accuracy_without_worst'][part]:.1f}" for part in shares),
        ]
        for criterion, about in found.items()
    ]
    silenced = [f"{100 * float(part):.0f}% silenced" for part in shares]
    parts = [
        "# Stability of the rankings",
        _AGREEMENT,
        markdown(["criterion", *CHECKS.values()], agreements),
        _TRUTH,
        markdown(["criterion", "with ablation", *silenced], left),
    ]
    return "\n\n".join(parts) + "\n"


def _shown(layers: Mapping[str, Mapping[str, float]] | None) -> str:
    if layers is None:
        return "–"
    spearman, half = (_mean(v[n] for v in layers.values()) for n in ("spearman", "top_half"))
    return f"{spearman:.2f} ({half:.2f})"


def _mean(values: Any) -> float:
    found = list(values)
    return float(sum(found) / len(found))
