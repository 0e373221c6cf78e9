"""qk-norm refuses a model that its class cannot hold."""

import pytest

from pretrain.config.schema import Config
from pretrain.errors import UserError
from pretrain.trainer.plan import make_plan
from tests.support.corpus import tiny


def test_biases_of_the_mlp_are_refused_and_not_dropped(corpus):
    content = tiny(corpus) | {"methods": [{"name": "qk_norm"}]}
    content["model"] = content["model"] | {"mlp_bias": True}
    with pytest.raises(UserError, match="qk_norm makes the model a Qwen3, whose MLPs have no biases"):
        make_plan(Config.model_validate(content), world_size=1)
