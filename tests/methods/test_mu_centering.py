"""The weights that mu-centering centres, and its conflicts. Its arithmetic on shards is tested in tests/sharded."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from pretrain.methods import REGISTRY, decisions_that_clash
from pretrain.methods.mu_centering import MuCentering
from pretrain.model.layout import describe


@dataclass
class Weights:
    """A stand-in for ShardedWeights that records the names of centred weights."""

    layout: dict
    centered: list = field(default_factory=list)

    def center_rows_(self, names):
        self.centered.append(list(names))


def method_of(tied: bool) -> MuCentering:
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    return MuCentering().bound(SimpleNamespace(head=head))


def layout_of(*names: str) -> dict:
    return {name: describe(name, (5,) if name.endswith("bias") else (5, 3)) for name in names}


@pytest.mark.parametrize(
    ("tied", "names", "centered"),
    [
        (False, ["model.embed_tokens.weight", "lm_head.weight"], ["lm_head.weight"]),
        (False, ["model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"], ["lm_head.weight", "lm_head.bias"]),
        (True, ["model.embed_tokens.weight"], ["model.embed_tokens.weight"]),
    ],
)
def test_it_centres_the_head_and_its_bias_after_every_step(tied, names, centered):
    method, weights = method_of(tied), Weights(layout_of(*names))
    for step in (1, 2, 3):
        assert method.after_step(step, weights) == {}
    assert weights.centered == [centered] * 3
    assert [name for name, weight in weights.layout.items() if method.training_rule(weight)] == centered


@pytest.mark.parametrize(("other", "reason"), [("softcap", "capped softmax"), ("mu_loss", "would do nothing")])
def test_what_it_cannot_be_combined_with(other, reason):
    (clash,) = decisions_that_clash((MuCentering(), REGISTRY[other]()))
    assert reason in clash
