"""The training state in a checkpoint of any layout: each weight's fp32 master and optimizer moments, found without reading.

`stored_weights` says where they lie, and `safetensors_weights` where the weights of a Hugging Face folder do.
A `StoredTensor` then reads any range of any tensor-parallel slice of a weight.
"""

from pretrain.checkpoints.stored.counters import Counters, stored_counters
from pretrain.checkpoints.stored.files import Span, open_stored
from pretrain.checkpoints.stored.safetensors_folder import safetensors_weights
from pretrain.checkpoints.stored.tensor import Part, StoredTensor
from pretrain.checkpoints.stored.universal import find_universal, is_universal, universal_counters, universal_weights
from pretrain.checkpoints.stored.weights import StoredWeight, master_weights, stored_weights

__all__ = [
    "Counters",
    "Part",
    "Span",
    "StoredTensor",
    "StoredWeight",
    "find_universal",
    "is_universal",
    "master_weights",
    "open_stored",
    "safetensors_weights",
    "stored_counters",
    "stored_weights",
    "universal_counters",
    "universal_weights",
]
