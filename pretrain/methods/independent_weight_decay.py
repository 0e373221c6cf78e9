"""Independent weight decay: the speed of the decay does not depend on the peak learning rate.

    W ← W − s_t λ W − s_t η · Adam's step,    s_t the schedule in 0..1, η the peak learning rate

torch's AdamW decays by s_t η · weight_decay, so a higher η also makes the decay faster. This is the same update with
weight_decay = λ / η, on the weights that decay anyway: matrices, and those that another method lets decay. Where Muon
steps a matrix, η is Muon's peak. The schedule still anneals the decay, as in the paper. The code of arXiv 2601.02031
decays by λ whatever the step.

Source: Loshchilov and Hutter 2019 (arXiv 1711.05101); Wortsman et al. 2023 (arXiv 2309.14322), whose 1e-4 is the default.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pretrain.methods.base import Method
from pretrain.model.layout import Weight


class IndependentWeightDecay(Method):
    """Independent weight decay in place of the run's `optim.weight_decay`. Nothing is left to fold.

    Attributes:
        coefficient: λ, the share of a weight that one step at the peak takes away.
    """

    name: Literal["independent_weight_decay"] = "independent_weight_decay"
    coefficient: float = Field(1e-4, gt=0, lt=1)

    def weight_decay(self, weight: Weight) -> float | None:
        return self.coefficient / self.run.peak_lr(weight)

    def training_rule(self, weight: Weight) -> str | None:
        if not self.run.weight_decay(weight):
            return None
        return f"independent_weight_decay: - {self.coefficient:g} (lr / {self.run.peak_lr(weight):g}) W"
