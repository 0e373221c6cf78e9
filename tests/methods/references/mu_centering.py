"""mu-centering: the head's matrix less the mean of its rows, after every step (arXiv 2601.02031)."""

from tests.support.dense import DenseLlama


class Reference(DenseLlama):
    def after_step(self):
        head = self.matrix("lm_head").data
        head.sub_(head.double().mean(0).float())
