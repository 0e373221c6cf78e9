"""TVR: W <- (W - m) target / s + m for a block matrix whose deviation s is off (arXiv 2503.17500).

The target is a share of what the random walk of AdamW leads to, and moves there from the initial deviation.
"""

from math import sqrt

from tests.support.dense import DenseLlama

OPTIONS = {
    "relative_target": 0.8,
    "target_warmup_steps": 3,
    "ratio_threshold": 1.01,
    "interval_steps": 2,
    "two_sided": True,
    "roles": ["q", "k", "v", "qkv", "o", "gate", "down"],
}


class Reference(DenseLlama):
    def target(self):
        settings = self.settings
        square = settings.std**2
        for lr in settings.lrs:
            square = square * (1 - lr * settings.weight_decay) ** 2 + lr**2
        final = self.options["relative_target"] * sqrt(square)
        return settings.std + (final - settings.std) * min(1, self.steps / self.options["target_warmup_steps"])

    def after_step(self):
        if self.steps % self.options["interval_steps"]:
            return
        for name, weight in self.weights.items():
            if not name.startswith("model.layers.") or weight.dim() != 2 or ".up_proj." in name:
                continue
            values = weight.data.double()
            ratio = float(values.std()) / self.target()
            if ratio > self.options["ratio_threshold"] or ratio < 1 / self.options["ratio_threshold"]:
                weight.data.copy_((values - values.mean()) / ratio + values.mean())
