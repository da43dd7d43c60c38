"""The guard against loss spikes: reports, limits or leaves out a step, or returns to an earlier checkpoint."""

import math
import sys
import time
import zlib
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterable

from ..checkpoint.state import HookState, TrainState
from ..config.guard import GuardConfig
from ..config.job import JobConfig
from ..data.intervals import Interval, length, merged
from ..exits import tell_restarts
from ..monitor.console import say
from ..spikes import Spikes
from .base import Hook, Run, StepReport, TrainerView
from .culprits import Culprits, culprits

PREFIX = "monitor.guard."


class GuardHook(Hook):
    """Judges each step between backward and update by its loss and gradient norm, which all ranks know: so all decide
    the same, without a collective. A spike takes the collectives of `culprits`; a rollback also those of a load.

    A batch that is left out changes nothing but the position: the next batch repeats the step. If even these spike,
    the weights are damaged. A rollback then loads a checkpoint from before `guard.margin` steps ago, leaves out the
    samples from there on, and repeats the steps before them bit by bit. So the run equals one that was started with
    these samples in data.skip. Leaving out some hundred batches around a spike follows PaLM (Chowdhery et al.,
    arXiv:2204.02311, 5.1); judging by a window of 128 steps, OLMo 2 (arXiv:2501.00656).

    A new stage of the data, or other data, batches or terms of the loss after a resume, have other losses: then the
    window starts again.
    """

    def __init__(
        self, config: GuardConfig, run: Run, stages: Iterable[int], data: int, skipped: Iterable[Interval] = ()
    ) -> None:
        """data: number that names corpora, batch and loss. skipped: `data.skip`."""
        self.config, self.run, self.stages, self.data = config, run, sorted(stages), data
        self.skipped = merged(skipped)
        self.news: Counter[str] = Counter()  # since the last finished step
        self._reset()

    def _reset(self) -> None:
        self.spikes = Spikes(self.config.window, self.config.threshold)
        self.streak = 0  # spikes in a row
        self.steps: deque[tuple[int, int]] = deque(maxlen=self.config.margin + 1)  # done, and samples consumed by then
        self.seen = self.data  # what the window was measured on

    def before_training(self, trainer: TrainerView) -> None:
        self._note(trainer)

    def after_step(self, trainer: TrainerView, report: StepReport) -> None:
        self._note(trainer)
        if self.news:
            report.scalars |= self.news
            state, self.news = trainer.state, Counter()
            gone = length(merged([*self.skipped, *state.left_out])) - length(self.skipped)
            report.scalars["guard_left_out"] = gone
            report.scalars["guard_rollbacks"] = state.rollbacks

    def _note(self, trainer: TrainerView) -> None:
        step = trainer.state.step
        if not self.steps or self.steps[-1][0] != step:  # not for a batch that is left out: it moves the position only
            self.steps.append((step, sum(trainer.state.samples.values())))

    def allows(self, trainer: TrainerView, report: StepReport) -> bool:
        now = self.data + bisect_right(self.stages, trainer.batches.samples.start(trainer.state.samples))
        if now != self.seen:
            self.spikes.clear()
            self.seen, self.streak = now, 0
        why = self.spikes.found(report.loss, report.grad_norm)
        if not why:
            self.spikes.add(report.loss, report.grad_norm)
            self.streak = 0
            return True
        self.streak += 1
        self.news["guard_spikes"] += 1
        return self._answer(trainer, report, f"spike at step {report.step:,}: {why}", culprits(trainer, report))

    def _answer(self, trainer: TrainerView, report: StepReport, why: str, found: Culprits) -> bool:
        """Acts on a spike, and says so. Returns False if the batch is left out."""
        state, last = trainer.state, self.streak > self.config.patience
        if self.config.reaches("skip") and not last:
            state.left_out = merged([*state.left_out, found.samples])
            self._tell(report, why, found, "batch left out")
            return False
        if self.config.reaches("rollback") and self._roll_back(trainer, report, why, found):
            return False
        if not (math.isfinite(report.loss) and math.isfinite(report.grad_norm)):
            self._tell(report, why, found, "the run ends")  # by the trainer
        elif last:
            self.spikes.clear()
            self.streak = 0
            self._tell(report, why, found, f"spike {self.config.patience + 1} in a row is taken as the new level")
        elif self.config.reaches("clip"):
            most = self.spikes.usual_norm
            report.clip = min(report.clip, most / max(most, report.grad_norm))
            self._tell(report, why, found, "gradient limited to the median norm")
        else:
            self._tell(report, why, found, "warning")
        return True

    def _roll_back(self, trainer: TrainerView, report: StepReport, why: str, found: Culprits) -> bool:
        """Returns to a checkpoint, without the samples of the last steps. Returns False if there is none.

        Raises FloatingPointError if the run has done so too often.
        """
        state, stop, last = trainer.state, found.samples[1], trainer.state.step - self.config.margin
        step, position = self.steps[0]
        if state.rollbacks >= self.config.max_rollbacks:
            self._tell(report, why, found, "the run ends")
            raise FloatingPointError(
                f"{why}, after guard.max_rollbacks={self.config.max_rollbacks}: lower optim.lr or raise"
                " optim.warmup_steps, and resume from the last checkpoint; or raise guard.max_rollbacks"
            )

        def begin(loaded: TrainState) -> int:
            return position if step <= last else sum(loaded.samples.values())  # the guard may be new in this run

        before = self.state_dict()
        self._reset()
        trainer.must_stop()  # rearms the watchdog: reading a checkpoint takes time
        loaded = self.run.manager.roll_back(
            last, lambda loaded: merged([*state.left_out, [begin(loaded), stop]]), state.rollbacks + 1
        )
        if loaded is None:
            self.load_state_dict(before)
            return False
        state.become(loaded)
        self._note(trainer)
        trainer.batches.restart(dict(state.samples), trainer.batches.samples.without(state.left_out))
        if self.run.log is not None:
            self.run.log.rewind(state.step)
        what = f"back to step {state.step:,}, without samples {begin(loaded):,} to {stop - 1:,}"
        self._tell(report, why, found, what, state.step)
        return True

    def _tell(self, report: StepReport, why: str, found: Culprits, what: str, to: int | None = None) -> None:
        """Says it on the terminal, in restarts.jsonl and in TensorBoard. to: step after a rollback."""
        log = self.run.log
        if log is None:
            return
        first, stop = found.samples
        rows = ", ".join(map(log.named, found.rows))
        text = (
            f"{why}; {what}; samples {first:,} to {stop - 1:,}, highest loss in {found.worst[0]:,} to"
            f" {found.worst[-1]:,} ({'; '.join(found.documents)}); largest gradients: rows {rows or 'none'}"
        )
        say(f"guard: {text}")
        log.tell("spikes", text, report.step if to is None else to)
        line = {"time": time.time(), "step": report.step, "class": "SPIKE", "decision": what, "why": why}
        numbers = {"loss": report.loss, "grad_norm": report.grad_norm}
        line |= {key: value if math.isfinite(value) else None for key, value in numbers.items()} | vars(found)
        try:
            tell_restarts(self.run.manager.run, [line])
        except OSError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)

    def state_dict(self) -> HookState:
        return {
            f"{PREFIX}losses": [*self.spikes.losses],
            f"{PREFIX}norms": [*self.spikes.norms],
            f"{PREFIX}streak": self.streak,
            f"{PREFIX}data": self.seen,
            f"{PREFIX}steps": [number for pair in self.steps for number in pair],
        }

    def load_state_dict(self, state: HookState) -> None:
        self._reset()
        numbers = {name.removeprefix(PREFIX): value for name, value in state.items()}
        self.spikes.losses.extend(numbers["losses"])  # type: ignore[arg-type]
        self.spikes.norms.extend(numbers["norms"])  # type: ignore[arg-type]
        self.streak, self.seen = numbers["streak"], numbers["data"]  # type: ignore[assignment]
        flat: list[int] = numbers["steps"]  # type: ignore[assignment]
        self.steps.extend(zip(flat[::2], flat[1::2], strict=True))


def build(config: JobConfig, run: Run) -> GuardHook | None:
    """The hook, unless guard.level is off."""
    if config.guard.level == "off":
        return None
    data, train, loss = config.data, config.train, (config.vocab.label_smoothing, config.vocab.z_loss)
    tokens = [corpus.name for corpus in run.data.corpora.values()]  # not the paths: a corpus may move, or come by URL
    settings = tokens, data.weights, data.documents, data.packing, train.global_batch, config.seq_len, loss
    return GuardHook(config.guard, run, data.stages, zlib.crc32(repr(settings).encode()), data.skip)
