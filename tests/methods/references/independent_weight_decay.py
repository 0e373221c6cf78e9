"""Independent weight decay: a step takes λ lr / (peak lr) of each matrix away, whatever the peak (arXiv 2309.14322)."""

from tests.support.dense import DenseLlama

OPTIONS = {"coefficient": 0.03}


class Reference(DenseLlama):
    def decay(self, name):
        return 0.0

    def update(self, name, weight, gradient):
        schedule = self.settings.lrs[self.steps - 1] / self.settings.peak_lr
        taken = 0.03 * schedule * weight if weight.dim() == 2 else 0.0
        super().update(name, weight, gradient)
        weight -= taken
