"""mu-loss: coefficient x the squared length of the head's mean row (arXiv 2601.02031)."""

from tests.support.dense import DenseLlama

OPTIONS = {"coefficient": 200.0}


class Reference(DenseLlama):
    def terms(self, logits, targets):
        mean_row = self.matrix("lm_head").sum(0) / self.settings.vocabulary
        return {"mu_loss": self.options["coefficient"] * mean_row @ mean_row}
