"""SeeDNorm: RMSNorm with the gain tanh(x·β) α + γ, in blocks and at the end; α and β decay (arXiv 2510.22777)."""

import torch

from tests.support.dense import DenseLlama

OPTIONS = {"alpha_init": 0.7}
EXPORTS = "EvenkeelLlamaForCausalLM"


def initial_value(name, settings):
    return {"alpha": 0.7, "beta": 0.0}.get(name.split(".")[-1])


class Reference(DenseLlama):
    def norm(self, x, module):
        gamma, alpha, beta = (self.weights[f"{module}.{kind}"] for kind in ("weight", "alpha", "beta"))
        size = (x.square().mean(-1, keepdim=True) + self.settings.eps).sqrt()
        along = torch.einsum("btd,d->bt", x, beta)[..., None]
        return (along.tanh() * alpha + gamma) * (x / size)

    def decay(self, name):
        return self.settings.weight_decay if name.endswith(("alpha", "beta")) else super().decay(name)
