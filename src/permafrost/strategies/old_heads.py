"""What a network answers for the tasks before the one that it learns."""

from torch import Tensor, nn
from torch.nn import functional as F

from permafrost.models import Head, TaskNetwork


def head_logits(
    network: TaskNetwork, head: Head, task: int, seen: int, embedding: Tensor
) -> Tensor:
    """Return an old task's logits (N, C), or those of all seen tasks if expanding.

    Parameters
    ----------
    network : TaskNetwork
        Whose heads are asked.
    head : {"shared", "multi", "expanding"}
        Under ``multi`` the gradient passes through an old head but does not move it.
    task : int
        The old task.
    seen : int
        How many tasks' classes an expanding head has.
    embedding : Tensor, shape (N, D)
        Pooled features.
    """
    answer = network.view(head, task, seen)[-1]
    if head != "multi":
        return answer(embedding)  # type: ignore[no-any-return]
    assert isinstance(answer, nn.Linear)
    return F.linear(embedding, answer.weight.detach(), answer.bias.detach())


def old_logits(network: TaskNetwork, head: Head, learned: int, embedding: Tensor) -> list[Tensor]:
    """Return the logits of all classes learned before, in groups of one softmax each.

    Returns
    -------
    list of Tensor, shape (N, C')
        ``shared``: the one head. ``multi``: a group for each old head. ``expanding``: one group of
        all old classes.
    """
    groups = learned if head == "multi" else 1
    return [head_logits(network, head, task, learned, embedding) for task in range(groups)]
