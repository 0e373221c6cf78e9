"""The `init` section: the distribution that matrices are drawn from."""

import pytest
import yaml
from pydantic import TypeAdapter

from pretrain.config.distributions import AnyInit, NormalInit
from pretrain.config.schema import Config, load_config
from pretrain.errors import UserError
from pretrain.sharded.draws import GeneralizedGaussian, Normal, TruncatedNormal, Uniform

TEXT = """\
name: run
model: {family: llama}
tokenizer: tok
data: {train: shards, seq_len: 32, global_batch_size: 8, micro_batch_size: 2}
steps: 10
optim: {lr: 1e-3}
deepspeed: ds.json
"""


def config(tmp_path, *overrides: str) -> Config:
    file = tmp_path / "run.yaml"
    file.write_text(TEXT)
    return load_config(file, overrides)


def test_a_run_without_the_section_is_normal(tmp_path):
    assert config(tmp_path).init == NormalInit()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"distribution": "normal"}, Normal(0.3)),
        ({"distribution": "truncated_normal"}, TruncatedNormal(0.3, 3.0)),
        ({"distribution": "truncated_normal", "bound": 2}, TruncatedNormal(0.3, 2.0)),
        ({"distribution": "uniform"}, Uniform(0.3)),
        ({"distribution": "generalized_gaussian"}, GeneralizedGaussian(0.3, 2.0)),
        ({"distribution": "generalized_gaussian", "shape": 1}, GeneralizedGaussian(0.3, 1.0)),
    ],
)
def test_each_distribution_has_the_deviation_that_is_asked_for(options, expected):
    init = TypeAdapter(AnyInit).validate_python(options)
    assert init.draw(0.3) == expected


def test_the_written_configuration_gives_the_same_distribution(tmp_path):
    run = config(tmp_path, "init.distribution=truncated_normal", "init.bound=2.5")
    assert Config.model_validate(yaml.safe_load(run.to_yaml())) == run
    assert run.init.draw(1.0) == TruncatedNormal(1.0, 2.5)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["init.distribution=normal", "init.bound=3"], "--set init.bound=3: unknown key 'init.bound'"),
        (["init.distribution=uniform", "init.shape=1"], "--set init.shape=1: unknown key 'init.shape'"),
        (["init.distribution=truncated_normal", "init.shape=1"], "unknown key 'init.shape'"),
        (["init.distribution=truncated_normal", "init.bond=1"], "did you mean 'init.bound'?"),
        (["init.distribution=truncated_normal", "init.bound=0"], "init.bound: Input should be greater"),
        (["init.distribution=truncated_normal", "init.bound=.inf"], "init.bound: Input should be a finite number"),
        (["init.distribution=truncated_normal", "init.bound=.nan"], "init.bound"),
        (["init.distribution=generalized_gaussian", "init.shape=0.1"], "init.shape: Input should be greater"),
        (["init.distribution=truncnormal"], "unknown distribution 'truncnormal'; did you mean 'truncated_normal'?"),
        (["init.bound=3"], "its 'distribution' is missing"),
    ],
)
def test_a_mistake_names_its_key(tmp_path, overrides, expected):
    with pytest.raises(UserError) as caught:
        config(tmp_path, *overrides)
    assert expected in str(caught.value)
