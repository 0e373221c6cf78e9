"""The method that docs/sharded_weights.md writes out does what the page says."""

import re
from pathlib import Path

import numpy as np
import pytest

from pretrain.errors import UserError
from pretrain.layout import describe
from pretrain.sharded import Moments

PAGE = Path(__file__).parents[2] / "docs" / "sharded_weights.md"


class DenseHead:
    """Stands in for ShardedWeights: an embedding and a head, dense."""

    def __init__(self) -> None:
        self.layout = {name: describe(name, (4, 3)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
        generator = np.random.default_rng(0)
        self.arrays = {name: generator.standard_normal((4, 3)) for name in self.layout}

    def moments(self, names):
        arrays = {name: self.arrays[name] for name in names}
        return {name: Moments(a.size, a.mean(), a.var() * a.size) for name, a in arrays.items()}

    def rescale_(self, changes):
        for name, (scale, shift) in changes.items():
            self.arrays[name] = self.arrays[name] * scale + shift


def test_the_method_of_the_documentation_works():
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    assert len(code.splitlines()) <= 30
    module = {"__name__": "head_anchor"}
    exec(code, module)
    weights, method = DenseHead(), module["HeadAnchor"](std=0.5)
    before = weights.arrays["model.embed_tokens.weight"].copy()
    method.check(list(weights.layout.values()))
    with pytest.raises(UserError, match="finds no head"):
        method.check([weights.layout["model.embed_tokens.weight"]])
    assert method.after_step(9, weights) == {}
    assert list(method.after_step(10, weights)) == ["lm_head.weight"]
    assert weights.arrays["lm_head.weight"].std(ddof=1) == pytest.approx(0.5)
    np.testing.assert_array_equal(weights.arrays["model.embed_tokens.weight"], before)
