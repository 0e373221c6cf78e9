"""The base of the placements: the names of an engine's weights, their slices, and which ranks hold the same elements."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pretrain.errors import UserError
from pretrain.sharded.engine_protocol import Engine
from pretrain.sharded.piece import Piece, Slice, make_piece, tensor_slice


class Owner:
    """One rank's view of its engine. A placement adds where the optimizer keeps the masters.

    Attributes:
        optimizer: the engine's optimizer, of a class of DeepSpeed's or torch's.
        parameters: this rank's parameters by the names of their weights.
        names: the names of the parameters by `id`.
        slices: the tensor-parallel slice of each weight that this rank computes with.
        tensor_ranks: the number of tensor-parallel ranks, 1 without tensor parallelism.
        tensor_rank: the number of this one among them, from 0 on.
    """

    parameters: Mapping[str, torch.nn.Parameter]

    def __init__(self, engine: Engine) -> None:
        """Bind to an engine.

        Raises:
            UserError: for a frozen weight, and for one that tensor parallelism cuts in several places.
        """
        self.optimizer = engine.optimizer
        self.parameters = dict(engine.module.named_parameters())
        self.names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.slices: dict[str, Slice] = {name: tensor_slice(p, name) for name, p in self.parameters.items()}
        if frozen := [name for name, parameter in self.parameters.items() if not parameter.requires_grad]:
            raise UserError(
                f"{frozen[0]} is frozen (requires_grad is false), and DeepSpeed keeps no master of it that a method could "
                "change. Make it a buffer."
            )
        self.tensor_ranks, self.tensor_rank = 1, 0
        if engine.autotp_size() > 1:
            from deepspeed.utils import groups

            self.tensor_ranks = groups.get_tensor_model_parallel_world_size()
            self.tensor_rank = groups.get_tensor_model_parallel_rank()

    def name(self, parameter: torch.nn.Parameter) -> str:
        """Return the name of a weight."""
        return self.names[id(parameter)]

    def piece(self, name: str, start: int, master: torch.Tensor, replicas: int = 1, replica: int = 0) -> Piece:
        """Return this rank's piece of a weight.

        Args:
            name: the weight's name.
            start: the index in the flattened slice of the first element that this rank owns.
            master: (owned elements,) float32 view of the optimizer's copy.
            replicas: the number of data-parallel ranks that own these same elements.
            replica: the number of this one among them, from 0 on.
        """
        part = self.slices[name]
        if part.dim is None:
            replicas, replica = replicas * self.tensor_ranks, replica * self.tensor_ranks + self.tensor_rank
        return make_piece(name, part, start, master, replicas, replica)
