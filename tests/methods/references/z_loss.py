"""z-loss: coefficient x mean of squared log-partition functions (arXiv 2204.02311, section 5)."""

from tests.support.dense import DenseLlama

OPTIONS = {"coefficient": 0.05}


class Reference(DenseLlama):
    def terms(self, logits, targets):
        return {"z_loss": self.options["coefficient"] * logits.exp().sum(-1).log().square().mean()}
