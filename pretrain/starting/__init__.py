"""The start of a run from the weights of another model (`model.init_from`) instead of drawn ones.

A `Source` is a Hugging Face folder or a checkpoint of another run. `model_of` takes what the run file leaves out of the
`model` section from its configuration. `starting_point` says which of its tensors each weight starts from, and checks names
and shapes. `start_from` reads each rank's share, and lets the methods take the weights over.
"""

from pretrain.starting.model_of import model_of
from pretrain.starting.point import StartingPoint, rule_in_words, starting_point
from pretrain.starting.start import start_from

__all__ = ["StartingPoint", "model_of", "rule_in_words", "start_from", "starting_point"]
