"""The stages that train the whole network, and whether they paid: judged on images held back, undone if they did not.

A short stage can lose: the first steps disturb what the layers learned, and with small batches so do the statistics.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from anncvt.passes.examples import HELD_OUT
from anncvt.passes.fit_jointly import JointFit, fit_jointly, joint_loss, refresh_statistics
from anncvt.passes.fit_logits import LogitFit, fit_logits
from anncvt.passes.objectives import backward
from anncvt.passes.pairing import Pair
from anncvt.progress import Progress

if TYPE_CHECKING:
    from anncvt.passes.calibration_state import CalibrationState

#: Images that the statistics are taken from, at most, and those that judge.
SETTLING, JUDGING = 2048, 256
#: Adder weights an image, at most: fewer images would be learned by heart, and the few that judge cannot show it (a
#: MobileNetV2 with 800 images gained by its loss and lost by its accuracy).
WEIGHTS_PER_IMAGE = 2500
#: Images that the time of a step is measured with first, and how much longer than in larger batches each may take.
FEW, AT_MOST = 8, 8


def divided(order: Tensor) -> tuple[Tensor, Tensor]:
    """The images to train on, and those that judge: others, unless there are too few (``order``: shuffled indices)."""
    count = min(len(order) // HELD_OUT, JUDGING)
    return (order[count:], order[:count]) if count else (order, order)


class WholeFit:
    """Trains the student end to end.

    Args:
        plain: images of some indices, as the networks take them.
        draw: the next images to train on, so many, mirrored at random or not.
        own, judge: indices as from :func:`divided`.
        teachable: a gradient flows back from what the networks return.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        paired: list[Pair],
        plain: Callable[[Tensor], Tensor],
        draw: Callable[[int, bool], Tensor],
        own: Tensor,
        judge: Tensor,
        joint: JointFit,
        logits: LogitFit,
        teachable: bool,
    ) -> None:
        self.teacher, self.student, self.paired, self.plain, self.draw = teacher, student, paired, plain, draw
        self.own, self.judge, self.joint, self.logits, self.teachable = own, judge, joint, logits, teachable
        self.scarce = sum(pair.adder.weight.numel() for pair in paired) > WEIGHTS_PER_IMAGE * len(own)

    def worthwhile(self, seconds: float) -> bool:
        """Whether there are images enough and ``seconds`` are, from the time that a step takes, for the joint stage."""
        if self.scarce:
            return False
        each, size = seconds / self.joint.least_steps, self.joint.batch_size
        self._time(FEW)  # which compiles kernels
        few = self._time(FEW) * size / FEW
        # In small networks more images at once take less time each.
        return each >= few or (AT_MOST * each >= few and each >= self._time(size))

    def _time(self, images: int) -> float:
        """Seconds of one step."""
        begin = time.monotonic()
        x = self.plain(self.own[:images])
        backward(joint_loss(self.teacher, self.student, self.paired, x, self.joint, {}, self.teachable))
        self.student.zero_grad()
        return time.monotonic() - begin

    def run(self, state: CalibrationState, deadline: float | None, progress: Progress) -> bool:
        """Go through the stages from ``state``, which follows; return whether what came of them is kept.

        With too few images, nothing but the statistics is taken again.
        """
        if self.scarce:
            self.settle()
            return True
        if state.fitted is None:
            self.settle()
            state.fitted = {"loss": self.loss(), "student": copy.deepcopy(self.student.state_dict())}
        networks, then = (self.teacher, self.student, self.paired, self.draw), (deadline, state.keep, progress)
        fit_jointly(*networks, self.joint, state.joint, *then, outputs=self.teachable)
        if self.teachable:
            fit_logits(*networks, self.logits, state.logits, *then)
        if not state.joint.steps and not state.logits.steps:
            return True
        self.settle()
        if self.loss() <= state.fitted["loss"]:  # not where it is no number
            return True
        self.student.load_state_dict(state.fitted["student"])
        return False

    def settle(self) -> None:
        """Take the statistics of the fitted norms again."""
        size = self.joint.batch_size
        parts = [part for part in self.own[:SETTLING].split(size) if len(part) == size]
        refresh_statistics(self.student, self.paired, map(self.plain, parts))
        self.student.eval()

    def loss(self) -> float:
        """The joint stage's, in eval mode, on the images that judge."""
        total = 0.0
        for part in self.judge.split(self.joint.batch_size):
            x, r2 = self.plain(part), dict[str, Any]()
            loss = joint_loss(self.teacher, self.student, self.paired, x, self.joint, r2, self.teachable)
            total += float(loss.detach()) * len(part) / len(self.judge)
        return total
