"""Activation penalty: coefficient x mean square of the stream after each block, by the definition."""

import torch

from tests.support.dense import DenseLlama

OPTIONS = {"coefficient": 20.0}


class Reference(DenseLlama):
    def after_block(self, x, layer):
        self.streams = [x] if layer == 0 else [*self.streams, x]

    def terms(self, logits, targets):
        return {"activation_penalty": self.options["coefficient"] * torch.stack(self.streams).square().mean()}
