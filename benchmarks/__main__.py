"""`python -m benchmarks`: measure, print the table and write benchmarks/latest.json."""

import os
import platform
import warnings
from pathlib import Path

import torch

from benchmarks import jobs, measure
from benchmarks.workflow import sweep_jobs, workflow_jobs
from permafrost.training import resolve_precision

ROUNDS = 5
# One file for each kind of machine.
LATEST = {
    "cpu": Path(__file__).parent / "latest.json",
    "cuda": Path(__file__).parent / "latest_gpu.json",
}

# The profile `paper`, one seed, on images of CIFAR-100's size.
STEPS = 10 * -(-10 * 500 // jobs.BATCH)  # of ten epochs of one task
TRAINED = 10 * 10 * 500 / 10_000  # of data, in units of 10,000 images
MEASURED = 10 * 2 * 1000 / 256  # test images after each epoch, in units of 256


def main() -> None:
    """Run every job."""
    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    peaks = measure.peaks(device)
    training = measure.measure(jobs.training_jobs(device), ROUNDS)
    methods = measure.measure([*jobs.strategy_jobs(device), jobs.fisher_job(device)], ROUNDS)
    fullgrad = measure.measure(jobs.fullgrad_jobs(device), ROUNDS)
    criteria = measure.measure(jobs.criteria_jobs(device), ROUNDS)
    layers = measure.measure(jobs.visualize_jobs(device), ROUNDS)
    rank, data, evaluation = measure.measure(
        [jobs.rank_job(), jobs.data_job(device), jobs.evaluation_job(device)], ROUNDS
    )
    pictures = jobs.whole(
        "visualise every filter of VGG16-BN", [(1, layer) for layer in layers], "5x"
    )
    deepest = jobs.whole("visualise the deepest block", [(1, layer) for layer in layers[-3:]], "8x")
    results = [*training, *methods, *fullgrad, *criteria, pictures, deepest, rank, data]
    for precision in dict.fromkeys(["float32", resolve_precision("auto", device)]):
        results.append(_paper(precision, training, fullgrad[0], pictures, rank, data, evaluation))
    with workflow_jobs() as nothing_to_do:
        results += measure.measure(nothing_to_do, ROUNDS)
    with sweep_jobs(device) as beside:
        results += measure.measure(beside, rounds=1)
    peaks = {
        name: max(peak, again)
        for (name, peak), again in zip(peaks.items(), measure.peaks(device).values(), strict=True)
    }
    print(", ".join(f"{name}: {peak / 1e9:,.0f} GFLOP/s" for name, peak in peaks.items()))

    named = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    rows = [result.row(peaks, named) for result in results]
    measure.write(rows, LATEST[device.type])
    print(measure.table(rows))


def _paper(
    precision: str,
    training: list[measure.Result],
    fullgrad: measure.Result,
    pictures: measure.Result,
    rank: measure.Result,
    data: measure.Result,
    evaluation: measure.Result,
) -> measure.Result:
    """Put the profile `paper` together, one seed: each kind of step as often as it is taken."""
    first, half, most = (r for r in training if r.job.precision == precision)
    # 4 metrics x 3 shares x 2 heads are frozen, a quarter like none; fine-tuning and the linear
    # probe for 2 heads, the probe's steps taken for a forward pass alone (one of 256 images for
    # four steps of 64); joint training of two tasks for 3 heads, for one and for two passes.
    plain_tasks = 1 + 2 + 4 * 2 + 3 * 2 * (1 + 2)
    trainings = plain_tasks + 2 * 4 * 2
    parts = [
        (plain_tasks * STEPS, first),
        (4 * 2 * STEPS, half),
        (4 * 2 * STEPS, most),
        (2 * STEPS / 4, evaluation),
        ((trainings + 2) * TRAINED, data),
        ((trainings + 2) * MEASURED, evaluation),
        (10 * 500, fullgrad),
        (1, pictures),
        (1, rank),
    ]
    name = f"profile paper, one seed, extrapolated, {precision}"
    return jobs.whole(name, parts, "3x", precision)


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
