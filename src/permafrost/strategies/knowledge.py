"""What methods need from the first task: made once for each seed, whatever the head.

Before a third or later task a strategy makes it anew.
"""

from collections.abc import Callable

from permafrost.strategies.base import Lesson, Memory
from permafrost.strategies.ewc import fisher_memory
from permafrost.strategies.lwf import teacher_memory
from permafrost.strategies.replay import buffer_memory
from permafrost.strategies.si import integral_memory

KNOWLEDGE: dict[str, Callable[[Lesson], Memory]] = {
    "fisher": fisher_memory,
    "path_integral": integral_memory,
    "teacher": teacher_memory,
    "buffer": buffer_memory,
}
