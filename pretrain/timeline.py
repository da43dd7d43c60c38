"""The parts of a step, and those who watch when one begins. Imports no torch.

Not part of trainer.py, because the model marks a part and hooks watch them, and both are below the trainer.
"""

from collections.abc import Callable

DATA, FORWARD, HEAD, BACKWARD, OPTIMIZER, HOOKS = "data", "forward", "head", "backward", "optimizer", "hooks"
PARTS = (DATA, FORWARD, HEAD, BACKWARD, OPTIMIZER, HOOKS)


class Timeline:
    """Tells its watchers which part of a step begins. Without watchers it does nothing.

    A part lasts until the next one begins. HOOKS also begins at the end of a step, and lasts until the next step.
    """

    def __init__(self) -> None:
        self.watchers: list[Callable[[str], None]] = []
        self._part = HOOKS

    def mark(self, part: str) -> None:
        """Begins a part. HEAD begins only after FORWARD: an evaluation calls the model as well."""
        if part == HEAD and self._part != FORWARD:
            return
        self._part = part
        for watch in self.watchers:
            watch(part)
